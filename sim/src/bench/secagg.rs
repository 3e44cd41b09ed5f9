//! One session of secure aggregation, every device and the coordinator in one process, over the state
//! machines and wire messages that ship. Counted are: keys, signatures, shares, masks, packing, adding,
//! recovery, and the encoding of messages. Not counted are training, and what moves bytes: TLS, gRPC, the
//! checksums of uploads.

#![allow(clippy::print_stdout, reason = "a program's result goes to standard output")]

use super::meter::Meter;
use anyhow::{Context, Result, anyhow, ensure};
use ed25519_dalek::SigningKey;
use fleetune_proto::{
    Digest,
    secure::{
        advertisement_to_wire, confirmations_to_wire, parse_advertisement, parse_bundle, parse_confirmation,
        parse_confirmations, parse_reveal, parse_roster, parse_shares, parse_survivors, reveal_to_wire,
        roster_to_wire, shares_to_wire,
    },
    wire,
};
use fleetune_secagg::{
    Assumptions, Certificate, Cohort, CohortPlan, Degrees, Device, DevicePolicy, Floors, Gathering, Identity,
    MEMBERS_MAX, MaskSuite, Registrars, RingBits, RingVector, SessionId, SessionParts, Terms,
};
use prost::Message;
use rand::{RngExt, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha20Rng;
use serde::Serialize;

const POPULATION: &str = "bench";
const TOKEN: [u8; 32] = [0; 32];

/// One session to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct SecaggArgs {
    /// Devices.
    #[arg(long, default_value_t = 16)]
    pub devices: u32,
    /// Values of a vector.
    #[arg(long, default_value_t = 1_000_000)]
    pub dimension: usize,
    /// Bits a value, 8 to 32.
    #[arg(long, default_value_t = 32)]
    pub bits: u32,
    /// Neighbours of each device; computed if not given.
    #[arg(long, requires = "threshold")]
    pub degree: Option<u32>,
    /// Shares that rebuild a secret; computed if not given.
    #[arg(long, requires = "degree")]
    pub threshold: Option<u32>,
    /// Share of the devices that vanish.
    #[arg(long, default_value_t = 0.0)]
    pub drop: f64,
    /// Step before which they vanish: 0 advertise, 1 share, 2 mask, 3 confirm, 4 reveal.
    #[arg(long, default_value_t = 2)]
    pub drop_step: usize,
    /// Mask suite: aes128_ctr or chacha20.
    #[arg(long, default_value = "aes128_ctr")]
    pub suite: String,
    /// Seed of the vectors, the keys and who vanishes.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// One line of JSON instead of words.
    #[arg(long)]
    pub json: bool,
}

/// What a session cost.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// Devices.
    pub devices: u32,
    /// Values of a vector.
    pub dimension: usize,
    /// Bits a value.
    pub bits: u32,
    /// Neighbours of each device.
    pub degree: u32,
    /// Shares that rebuild a secret.
    pub threshold: u32,
    /// Devices that vanished.
    pub dropped: u32,
    /// Step before which they vanished.
    pub drop_step: usize,
    /// Mask suite.
    pub suite: &'static str,
    /// CPU seconds of a device that stayed to the end, mean.
    pub client_cpu_s: f64,
    /// CPU seconds of the coordinator, one thread.
    pub server_cpu_s: f64,
    /// Bytes that such a device sent, mean.
    pub upload_bytes: f64,
    /// Bytes that it received, mean.
    pub download_bytes: f64,
    /// Most bytes that the coordinator held at once, one packed upload included.
    pub server_peak_bytes: i64,
    /// Vectors in the sum.
    pub survivors: u32,
    /// True if the sum is the survivors' plain sum, bit for bit.
    pub exact: bool,
}

/// Measures and prints.
pub(super) fn run(args: &SecaggArgs) -> Result<()> {
    let measured = measure(args)?;
    if args.json {
        println!("{}", serde_json::to_string(&measured)?);
        return Ok(());
    }
    println!(
        "{} devices, {} values of {} bits, {} neighbours, threshold {}, {} lost before step {}, {}",
        measured.devices,
        measured.dimension,
        measured.bits,
        measured.degree,
        measured.threshold,
        measured.dropped,
        measured.drop_step,
        measured.suite
    );
    println!("device       {:.2} ms of CPU", measured.client_cpu_s * 1e3);
    println!("             {:.0} bytes up, {:.0} down", measured.upload_bytes, measured.download_bytes);
    println!("coordinator  {:.2} ms of CPU", measured.server_cpu_s * 1e3);
    println!("             {:.2} MB at most", measured.server_peak_bytes as f64 / 1e6);
    println!(
        "sum          of {} vectors, {}",
        measured.survivors,
        if measured.exact { "exact" } else { "WRONG" }
    );
    Ok(())
}

/// Runs one session.
pub fn measure(args: &SecaggArgs) -> Result<Measured> {
    let mut session = Session::new(args)?;
    let gathering = session.advertise()?;
    let mut cohort = session.share(gathering)?;
    session.mask(&mut cohort)?;
    session.confirm(&mut cohort)?;
    session.reveal(&mut cohort)?;
    let degrees = cohort.degrees();
    let opened = session.server.charge(|| cohort.into_opening().run(1));
    let opened = opened.context("opening the sum")?;
    let finished: Vec<&Member> = session.members.iter().filter(|member| member.finished).collect();
    let mean = |of: fn(&Member) -> f64| finished.iter().map(|m| of(m)).sum::<f64>() / finished.len() as f64;
    Ok(Measured {
        devices: args.devices,
        dimension: args.dimension,
        bits: args.bits,
        degree: degrees.degree,
        threshold: degrees.threshold,
        dropped: session.dropped,
        drop_step: args.drop_step,
        suite: session.terms.suite.name(),
        client_cpu_s: mean(|member| member.meter.cpu_s),
        server_cpu_s: session.server.cpu_s,
        upload_bytes: mean(|member| member.sent as f64),
        download_bytes: mean(|member| member.received as f64),
        server_peak_bytes: session.server.peak_bytes + session.packed_len(),
        survivors: opened.survivors,
        exact: opened.sum == session.plain_sum,
    })
}

/// A device and what it has cost.
struct Member {
    identity: Identity,
    device: Option<Device>,
    /// Step before which it vanishes.
    vanishes: Option<usize>,
    place: u32,
    meter: Meter,
    sent: usize,
    received: usize,
    finished: bool,
}

struct Session {
    terms: Terms,
    policy: DevicePolicy,
    plan: CohortPlan,
    members: Vec<Member>,
    rng: ChaCha20Rng,
    seed: u64,
    server: Meter,
    plain_sum: RingVector,
    dropped: u32,
}

impl Session {
    fn new(args: &SecaggArgs) -> Result<Self> {
        ensure!((2..=MEMBERS_MAX).contains(&(args.devices as usize)), "--devices: 2 to {MEMBERS_MAX}");
        ensure!((0.0..1.0).contains(&args.drop), "--drop: 0 up to, without, 1");
        ensure!(args.drop_step <= 4, "--drop-step: 0 to 4");
        ensure!((1..=1 << 28).contains(&args.dimension), "--dimension: 1 to {}", 1 << 28);
        let bits = RingBits::new(args.bits).context("--bits")?;
        let suite = match args.suite.as_str() {
            "aes128_ctr" => MaskSuite::Aes128Ctr,
            "chacha20" => MaskSuite::ChaCha20,
            other => return Err(anyhow!("--suite: {other:?}; aes128_ctr or chacha20")),
        };
        let mut rng = ChaCha20Rng::seed_from_u64(args.seed);
        let registrar = SigningKey::from_bytes(&rng.random());
        let (members, dropped) = members(args, &registrar, &mut rng)?;
        let by_hand = args.degree.zip(args.threshold);
        let terms = terms(suite, bits, args.dimension);
        Ok(Self {
            terms,
            policy: DevicePolicy {
                population: POPULATION.into(),
                registrars: Registrars::Keys(vec![registrar.verifying_key()]),
                floors: floors(args.devices, dropped, by_hand.is_some()),
            },
            plan: CohortPlan {
                members_max: args.devices,
                survivors_min: 2,
                assumptions: Assumptions::new(100, 200, 40, 20).context("assumptions")?,
                degrees: by_hand.map(|(degree, threshold)| Degrees { degree, threshold }),
            },
            members,
            rng,
            seed: args.seed,
            server: Meter::default(),
            plain_sum: RingVector::zeros(bits, args.dimension),
            dropped,
        })
    }

    fn advertise(&mut self) -> Result<Gathering> {
        let Self { terms, policy, members, rng, server, .. } = self;
        let mut gathering =
            server.charge(|| Gathering::new(*terms, &policy.population, policy.registrars.clone()));
        for member in members.iter_mut().filter(|member| member.is_there(0)) {
            let request = member.meter.charge(|| {
                let (device, advertisement) = Device::advertise(*terms, &member.identity, rng);
                member.device = Some(device);
                let keys = Some(advertisement_to_wire(&advertisement));
                wire::AdvertiseKeysRequest { session_token: TOKEN.to_vec(), keys }.encode_to_vec()
            });
            member.sent += request.len();
            member.place = server.charge(|| {
                let request = wire::AdvertiseKeysRequest::decode(&*request)?;
                anyhow::Ok(gathering.admit(parse_advertisement(request.keys)?, 0)?)
            })?;
        }
        Ok(gathering)
    }

    fn share(&mut self, gathering: Gathering) -> Result<Cohort> {
        let Self { policy, plan, members, rng, server, .. } = self;
        let (mut cohorts, seats) = server.charge(|| gathering.into_cohorts(plan)).context("degrees")?;
        let mut cohort = cohorts.pop().context("a cohort")?;
        for member in members.iter_mut().filter(|member| member.is_there(0)) {
            member.place = seats[member.place as usize].index;
            let roster = server.charge(|| roster_to_wire(&cohort.roster_view(member.place)).encode_to_vec());
            member.received += roster.len();
            let request = member.meter.charge(|| {
                let view = parse_roster(wire::Roster::decode(&*roster)?)?;
                let device = member.device.as_mut().context("advertised")?;
                let bundle = device.handle_roster(&view, policy, 0, rng)?;
                let (commitment, shares) = (bundle.commitment.to_vec(), shares_to_wire(&bundle.shares));
                let session_token = TOKEN.to_vec();
                anyhow::Ok(wire::ShareKeysRequest { session_token, commitment, shares }.encode_to_vec())
            })?;
            server.charge(|| drop(roster));
            member.sent += request.len();
            if member.is_there(1) {
                server.charge(|| {
                    let bundle = parse_bundle(&wire::ShareKeysRequest::decode(&*request)?)?;
                    anyhow::Ok(cohort.handle_shares(member.place, bundle)?)
                })?;
            }
        }
        server.charge(|| cohort.close_step()).context("sharing")?;
        Ok(cohort)
    }

    fn mask(&mut self, cohort: &mut Cohort) -> Result<()> {
        let (terms, seed) = (self.terms, self.seed);
        let Self { members, server, plain_sum, .. } = self;
        for (number, member) in (0..).zip(members).filter(|(_, member)| member.is_there(1)) {
            let forwarded = server.charge(|| {
                let shares = cohort.forwarded(member.place).map(|shares| shares_to_wire(&shares));
                shares.map(|shares| wire::SealedShares { shares }.encode_to_vec())
            });
            let forwarded = forwarded.context("forwarded shares")?;
            member.received += forwarded.len();
            let vector = vector(&terms, seed, number);
            if member.is_there(2) {
                plain_sum.add_assign(&vector)?;
            }
            let packed = member.meter.charge(|| {
                let shares = parse_shares(&wire::SealedShares::decode(&*forwarded)?.shares)?;
                let device = member.device.as_mut().context("advertised")?;
                anyhow::Ok(device.handle_shares(&shares, vector)?.pack())
            })?;
            server.charge(|| drop(forwarded));
            member.sent += packed.len() + submit_len(&packed);
            if member.is_there(2) {
                server.charge(|| cohort.handle_masked(member.place, [0; 32], &packed))?;
            }
        }
        server.charge(|| cohort.close_step()).context("masking")
    }

    fn confirm(&mut self, cohort: &mut Cohort) -> Result<()> {
        let Self { policy, members, server, .. } = self;
        for member in members.iter_mut().filter(|member| member.is_there(2)) {
            let survivors = server.charge(|| {
                wire::Survivors { bitmap: cohort.survivors().as_bytes().to_vec() }.encode_to_vec()
            });
            member.received += survivors.len();
            let request = member.meter.charge(|| {
                let device = member.device.as_mut().context("advertised")?;
                let count = device.cohort().map_or(0, |(members, _)| members);
                let survivors = parse_survivors(count, &wire::Survivors::decode(&*survivors)?)?;
                let signed = device.handle_survivors(&survivors, policy, &member.identity)?;
                let (index, signature) = (signed.index, signed.signature.to_vec());
                let session_token = TOKEN.to_vec();
                anyhow::Ok(wire::ConfirmSurvivorsRequest { session_token, index, signature }.encode_to_vec())
            })?;
            server.charge(|| drop(survivors));
            member.sent += request.len();
            if member.is_there(3) {
                server.charge(|| {
                    let request = wire::ConfirmSurvivorsRequest::decode(&*request)?;
                    let signed = parse_confirmation(request.index, &request.signature)?;
                    anyhow::Ok(cohort.handle_confirmation(member.place, signed)?)
                })?;
            }
        }
        server.charge(|| cohort.close_step()).context("confirming")
    }

    fn reveal(&mut self, cohort: &mut Cohort) -> Result<()> {
        let Self { members, server, .. } = self;
        for member in members.iter_mut().filter(|member| member.is_there(3)) {
            let confirmations = server.charge(|| {
                let confirmations = cohort.confirmations(member.place);
                confirmations.map(|c| confirmations_to_wire(&c).encode_to_vec())
            });
            let confirmations = confirmations.context("too few neighbours confirmed")?;
            member.received += confirmations.len();
            let request = member.meter.charge(|| {
                let confirmations = parse_confirmations(&wire::Confirmations::decode(&*confirmations)?)?;
                let device = member.device.as_mut().context("advertised")?;
                let shares = reveal_to_wire(&device.handle_confirmations(&confirmations)?);
                anyhow::Ok(
                    wire::RevealSharesRequest { session_token: TOKEN.to_vec(), shares }.encode_to_vec(),
                )
            })?;
            server.charge(|| drop(confirmations));
            member.sent += request.len();
            if member.is_there(4) {
                server.charge(|| {
                    let reveal = parse_reveal(&wire::RevealSharesRequest::decode(&*request)?.shares)?;
                    anyhow::Ok(cohort.handle_reveal(member.place, reveal)?)
                })?;
                member.finished = true;
            }
        }
        server.charge(|| cohort.close_step()).context("revealing")
    }

    fn packed_len(&self) -> i64 {
        i64::try_from(self.terms.bits.packed_len(self.terms.dimension)).unwrap_or(i64::MAX)
    }
}

impl Member {
    fn is_there(&self, step: usize) -> bool {
        self.vanishes.is_none_or(|vanishes| step < vanishes)
    }
}

fn members(args: &SecaggArgs, registrar: &SigningKey, rng: &mut ChaCha20Rng) -> Result<(Vec<Member>, u32)> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of a u32")]
    let dropped = (f64::from(args.devices) * args.drop).floor() as u32;
    let mut vanishing: Vec<bool> = (0..args.devices).map(|i| i < dropped).collect();
    vanishing.shuffle(rng);
    let member = |vanishes: bool| {
        let key = SigningKey::from_bytes(&rng.random());
        let public = key.verifying_key().to_bytes();
        let identity = Identity::new(key, Certificate::issue(registrar, POPULATION, public, u64::MAX))?;
        let (vanishes, meter) = (vanishes.then_some(args.drop_step), Meter::default());
        let (device, place, sent, received) = (None, 0, 0, 0);
        Ok(Member { identity, device, vanishes, place, meter, sent, received, finished: false })
    };
    Ok((vanishing.into_iter().map(member).collect::<Result<_>>()?, dropped))
}

fn terms(suite: MaskSuite, bits: RingBits, dimension: usize) -> Terms {
    let session = SessionId::derive(&SessionParts {
        population: POPULATION,
        task: "secagg",
        round: 0,
        attempt: 0,
        model_sha256: [0; 32],
        config_sha256: [0; 32],
        server_nonce: [0; 32],
    });
    Terms { session, config_sha256: [0; 32], suite, bits, dimension }
}

/// The shipped floors; where degree and threshold come from the command line, the least that still demands a
/// connected graph and twice the threshold above the degree.
fn floors(devices: u32, dropped: u32, by_hand: bool) -> Floors {
    let least = Floors { cohort_min: 2, survivors_min: 2, ..Floors::default() };
    if !by_hand {
        return least;
    }
    let dropout_permille = (u64::from(dropped) * 1000).div_ceil(u64::from(devices));
    let dropout_permille = u32::try_from(dropout_permille).unwrap_or(1000);
    Floors {
        corrupted_permille: 0,
        dropout_permille,
        sparse_dropout_permille: dropout_permille,
        full_graph_below: 0,
        ..least
    }
}

fn vector(terms: &Terms, seed: u64, number: u64) -> RingVector {
    let mut rng = ChaCha20Rng::seed_from_u64(seed ^ number << 20);
    RingVector::from_lanes(terms.bits, (0..terms.dimension).map(|_| rng.random()).collect())
}

/// What submitting an upload takes beside its bytes.
fn submit_len(packed: &[u8]) -> usize {
    let blob = Digest { sha256: [0; 32], size: packed.len() as u64 }.to_wire();
    let masked_update = Some(wire::Resource { source: Some(wire::resource::Source::Blob(blob)) });
    wire::SubmitMaskedUpdateRequest { session_token: TOKEN.to_vec(), masked_update }.encoded_len()
}
