//! A roster that this device has checked: its own place, its neighbours, and the keys towards each.

use super::{Abort, DevicePolicy};
use crate::{
    graph::Graph,
    identity::DeviceId,
    key_schedule::{Binding, End, agree},
    messages::{Advertisement, RosterEntry, RosterView},
    parameters::Degrees,
    roster_tree::verify_path,
    session_id::Terms,
};
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

/// Each share key encrypts one message, so the nonce need not differ.
pub(super) const SHARE_NONCE: [u8; 12] = [0; 12];

/// The roster around this device.
pub(super) struct Roster {
    pub(super) binding: Binding,
    pub(super) members: u32,
    pub(super) degrees: Degrees,
    pub(super) index: u32,
    pub(super) own_id: DeviceId,
    pub(super) neighbours: Vec<Neighbour>,
}

/// A neighbour, verified.
pub(super) struct Neighbour {
    pub(super) index: u32,
    pub(super) id: DeviceId,
    pub(super) public_key: [u8; 32],
    pub(super) mask_key: [u8; 32],
    pub(super) key_out: Zeroizing<[u8; 32]>,
    pub(super) key_in: Zeroizing<[u8; 32]>,
}

impl Neighbour {
    pub(super) fn mask_end(&self) -> End<'_> {
        End { index: self.index, id: &self.id, key: &self.mask_key }
    }
}

impl Roster {
    /// Checks everything in a view but its size and degrees, which the floors have passed.
    pub(super) fn accept(
        view: &RosterView,
        terms: &Terms,
        own: &Advertisement,
        share_secret: &StaticSecret,
        policy: &DevicePolicy,
        now_unix_ms: u64,
    ) -> Result<Self, Abort> {
        check_order(view, own)?;
        let binding = Binding::new(terms, &view.root, &view.ids);
        // A roster without this device, or with other keys in its name: a split or substituted roster.
        if !verify_path(&view.root, view.members, view.index, &own.leaf(), &view.path) {
            return Err(Abort::OwnEntry(view.index));
        }
        check_neighbourhood(view, &binding)?;
        check_distinct(view, own)?;
        let advertisements: Vec<&Advertisement> = view.neighbours.iter().map(|n| &n.advertisement).collect();
        let (session, population) = (&terms.session, &policy.population);
        Advertisement::verify_all(&advertisements, session, &policy.registrars, population, now_unix_ms)
            .map_err(|(at, source)| Abort::Neighbour { index: view.neighbours[at].index, source })?;
        let own_id = own.id();
        let accept = |entry: &RosterEntry| {
            let advertisement = &entry.advertisement;
            if !verify_path(&view.root, view.members, entry.index, &advertisement.leaf(), &entry.path) {
                return Err(Abort::NotInRoster(entry.index));
            }
            let shared =
                agree(share_secret, &advertisement.share_key).map_err(|_| Abort::LowOrderKey(entry.index))?;
            let id = advertisement.id();
            let me = End { index: view.index, id: &own_id, key: &own.share_key };
            let peer = End { index: entry.index, id: &id, key: &advertisement.share_key };
            Ok(Neighbour {
                index: entry.index,
                id,
                public_key: advertisement.certificate.public_key,
                mask_key: advertisement.mask_key,
                key_out: binding.share_key(&shared, me, peer),
                key_in: binding.share_key(&shared, peer, me),
            })
        };
        let neighbours = view.neighbours.iter().map(accept).collect::<Result<_, _>>()?;
        let RosterView { members, degrees, index, .. } = *view;
        Ok(Self { binding, members, degrees, index, own_id, neighbours })
    }

    pub(super) fn own_mask_end<'a>(&'a self, own: &'a Advertisement) -> End<'a> {
        End { index: self.index, id: &self.own_id, key: &own.mask_key }
    }
}

/// One identity in two places would count twice among the corrupted, and a coordinator that chose the order
/// could draw graphs at will. Each device checks its own and its neighbours' places, so an id that is not its
/// holder's is refused by those around it.
fn check_order(view: &RosterView, own: &Advertisement) -> Result<(), Abort> {
    let ascending = view.ids.windows(2).all(|pair| pair[0] < pair[1]);
    let in_place = |index: u32, id: DeviceId| view.ids.get(index as usize) == Some(&id);
    let mut neighbours = view.neighbours.iter();
    let placed =
        in_place(view.index, own.id()) && neighbours.all(|n| in_place(n.index, n.advertisement.id()));
    if view.ids.len() == view.members as usize && ascending && placed {
        Ok(())
    } else {
        Err(Abort::RosterOrder)
    }
}

/// Recomputes the graph: a coordinator that could choose a device's neighbours would surround it with its own.
fn check_neighbourhood(view: &RosterView, binding: &Binding) -> Result<(), Abort> {
    let graph = Graph::new(view.members, view.degrees.degree, &binding.graph_seed());
    let named = view.neighbours.iter().map(|entry| entry.index);
    if named.eq(graph.neighbours(view.index)) { Ok(()) } else { Err(Abort::WrongNeighbours) }
}

/// One colluding device under several names, or one key in several places, must not count as several.
fn check_distinct(view: &RosterView, own: &Advertisement) -> Result<(), Abort> {
    let entries = || view.neighbours.iter().map(|entry| (entry.index, &entry.advertisement));
    let all = || entries().chain([(view.index, own)]);
    let mut keys: Vec<([u8; 32], u32)> = all()
        .flat_map(|(index, a)| [(a.share_key, index), (a.mask_key, index)])
        .chain(all().map(|(index, a)| (a.certificate.public_key, index)))
        .collect();
    keys.sort_unstable();
    match keys.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => Err(Abort::Duplicate(pair[1].1)),
        None => Ok(()),
    }
}
