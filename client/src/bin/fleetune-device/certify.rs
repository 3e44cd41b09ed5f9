//! `fleetune-device identity` and `certify`: the device's public key, and a registrar's word for it.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Args;
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::DecodePrivateKey;
use fleetune_client::{Certificate, Name, identity};

use crate::settings::parse_32;

const DAY_MS: u64 = 24 * 3600 * 1000;

/// Flags of `identity`.
#[derive(Args)]
pub(crate) struct IdentityArguments {
    /// The device's directory.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
}

/// Flags of `certify`.
#[derive(Args)]
pub(crate) struct CertifyArguments {
    /// The registrar's Ed25519 key, PKCS #8 PEM (`fleetune-coordinator keygen` makes one).
    #[arg(long, value_name = "FILE")]
    registrar_key: PathBuf,
    /// Population that the device belongs to.
    #[arg(long, value_name = "NAME")]
    population: String,
    /// The device's public key, as `fleetune-device identity` prints it.
    #[arg(long, value_name = "HEX")]
    public_key: String,
    /// Days until the certificate is void.
    #[arg(long, value_name = "N", default_value_t = 365)]
    days: u32,
}

/// Prints the public key; draws the key if there is none.
pub(crate) fn identity(arguments: &IdentityArguments) -> Result<()> {
    let key = identity::public_key(&arguments.state)?;
    Ok(writeln!(io::stdout(), "{}", hex::encode(key))?)
}

/// Prints the certificate.
#[expect(clippy::disallowed_methods, reason = "a certificate's life counts from now")]
pub(crate) fn certify(arguments: &CertifyArguments) -> Result<()> {
    let path = &arguments.registrar_key;
    let pem = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let registrar = SigningKey::from_pkcs8_pem(&pem)
        .ok()
        .with_context(|| format!("{}: not an Ed25519 key in PKCS #8 PEM", path.display()))?;
    let population = Name::parse("--population", &arguments.population)?;
    let public_key = parse_32(&arguments.public_key).context("--public-key")?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
    let now_ms = u64::try_from(now.as_millis()).context("the clock is far in the future")?;
    let expires = now_ms + u64::from(arguments.days) * DAY_MS;
    let certificate = Certificate::issue(&registrar, population.as_str(), public_key, expires);
    Ok(writeln!(io::stdout(), "{}", hex::encode(certificate.to_bytes()))?)
}

/// A certificate in hexadecimal.
pub(crate) fn parse_certificate(text: &str) -> Result<Certificate> {
    let bytes = hex::decode(text).ok().and_then(|bytes| Certificate::from_bytes(&bytes));
    bytes.with_context(|| format!("{} characters; a certificate is 208 hexadecimal digits", text.len()))
}
