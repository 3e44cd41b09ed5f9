//! TLS between a device's transport and the coordinator's server.

use super::fleet::Site;
use super::hostile::check_in;
use fleetune_client::{GrpcOptions, GrpcTransport, Transport};
use std::fs;

#[test]
fn a_device_speaks_to_a_certified_coordinator_and_to_no_other() {
    let site = Site::insecure(1, "report_goal = 2\nselected_max = 2\nreports_min = 2", 1, 1);
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let certificate = certified.cert.pem();
    fs::write(site.path("certificate.pem"), &certificate).expect("a file");
    fs::write(site.path("tls-key.pem"), certified.signing_key.serialize_pem()).expect("a file");
    let config = fs::read_to_string(site.path("coordinator.toml")).expect("the configuration");
    let listen = "[listen]\ncertificate_file = \"certificate.pem\"\nkey_file = \"tls-key.pem\"\n[pace]";
    fs::write(site.path("coordinator.toml"), config.replace("[pace]", listen)).expect("the configuration");
    let _coordinator = site.coordinator();
    let address = fs::read_to_string(site.path("address")).expect("an address");
    let port = address.trim().rsplit(':').next().expect("a port");
    let transport = |scheme: &str, ca_pem: Option<Vec<u8>>| {
        let coordinator = format!("{scheme}://localhost:{port}");
        GrpcTransport::new(&GrpcOptions { coordinator, ca_pem, ..GrpcOptions::default() })
            .expect("a transport")
    };
    let call = |mut transport: GrpcTransport| transport.call(check_in("test", 1, Vec::new()));
    call(transport("https", Some(certificate.into_bytes()))).expect("the certificate is trusted");
    call(transport("https", None)).expect_err("nobody vouches for the certificate");
    call(transport("http", None)).expect_err("plaintext is not served");
}
