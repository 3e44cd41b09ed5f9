//! Addresses, codes, and a coordinator that is not there.

use fleetune_proto::wire;
use tonic::Code;

use super::*;
use status::failure;

fn road(coordinator: &str) -> Result<GrpcTransport, GrpcError> {
    GrpcTransport::new(&GrpcOptions { coordinator: coordinator.to_owned(), ..GrpcOptions::default() })
}

#[test]
fn plaintext_stays_on_this_machine() {
    for near in
        ["http://127.0.0.1:7000", "http://[::1]:7000", "http://localhost:7000", "https://fleet.example"]
    {
        assert!(road(near).is_ok(), "{near}");
    }
    for far in ["http://10.0.0.1:7000", "http://fleet.example", "http://localhost.fleet.example"] {
        assert!(matches!(road(far), Err(GrpcError::Plaintext { .. })), "{far}");
    }
    let loud = GrpcOptions {
        coordinator: "http://10.0.0.1:7000".into(),
        insecure_plaintext_remote: true,
        ..GrpcOptions::default()
    };
    assert!(GrpcTransport::new(&loud).is_ok());
    for wrong in ["", "fleet.example", "ftp://fleet.example", "https://"] {
        assert!(matches!(road(wrong), Err(GrpcError::Address { .. })), "{wrong:?}");
    }
}

#[test]
fn codes_become_what_the_machine_knows() {
    let kind = |code| failure(&Status::new(code, "words")).kind;
    assert_eq!(kind(Code::Unavailable), FailureKind::Unavailable);
    assert_eq!(kind(Code::Unauthenticated), FailureKind::Unauthenticated);
    assert_eq!(kind(Code::AlreadyExists), FailureKind::AlreadyExists);
    assert_eq!(kind(Code::Unimplemented), FailureKind::Unimplemented);
    assert_eq!(kind(Code::Unknown), FailureKind::Internal, "the server's own");
    let mut broken = Status::new(Code::Unknown, "transport error");
    broken.set_source(std::sync::Arc::new(std::io::Error::other("connection reset")));
    let failure = failure(&broken);
    assert_eq!(failure.kind, FailureKind::Unavailable, "a broken connection comes back");
    assert_eq!(failure.message, "transport error: connection reset");
}

#[test]
fn nobody_there_is_unavailable() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let mut road = road(&format!("http://{address}")).unwrap();
    let failure = road.call(Request::CheckIn(wire::CheckInRequest::default())).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Unavailable, "{failure}");
    let digest = Digest::of(b"blob");
    let failure = road.read_blob(digest, 0, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Unavailable, "{failure}");
}
