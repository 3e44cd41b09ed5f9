//! Downloads that break, lie or find no room.

use std::process::Command;

use super::*;

const CHUNK: usize = 1000;

fn blob() -> Vec<u8> {
    (0..10_500u32).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect()
}

fn chunk(bytes: &[u8], offset: usize) -> wire::ReadBlobResponse {
    let data = bytes[offset..bytes.len().min(offset + CHUNK)].to_vec();
    wire::ReadBlobResponse { offset: offset as u64, crc32c: crc32c::crc32c(&data), data }
}

fn receive(incoming: &mut Incoming<'_>, bytes: &[u8], until: usize) {
    while incoming.next_offset() < until as u64 {
        let offset = usize::try_from(incoming.next_offset()).unwrap();
        incoming.accept(&chunk(bytes, offset)).unwrap();
    }
}

fn store() -> (tempfile::TempDir, BlobStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = BlobStore::open(dir.path().join("blobs")).unwrap();
    (dir, store)
}

#[test]
fn an_interrupted_download_goes_on_where_it_was() {
    let ((_dir, store), bytes) = (store(), blob());
    let digest = Digest::of(&bytes);
    let mut first = store.receive(digest).unwrap();
    receive(&mut first, &bytes, 4000);
    drop(first);
    assert!(!store.holds(digest), "a part is not the blob");
    let mut second = store.receive(digest).unwrap();
    assert_eq!(second.next_offset(), 4000);
    receive(&mut second, &bytes, bytes.len());
    second.finish().unwrap();
    assert!(store.holds(digest));
    assert_eq!(store.read(digest).unwrap(), bytes);
    assert_eq!(files::names_in(&store.dir).unwrap(), [digest.hex()]);
}

#[test]
fn a_flipped_bit_on_the_way_is_refused_and_the_rest_is_kept() {
    let ((_dir, store), bytes) = (store(), blob());
    let mut incoming = store.receive(Digest::of(&bytes)).unwrap();
    receive(&mut incoming, &bytes, 2000);
    let mut damaged = chunk(&bytes, 2000);
    damaged.data[17] ^= 4;
    let error = incoming.accept(&damaged).unwrap_err();
    assert!(matches!(error, ReceiveError::Transfer(TransferError::Damaged { offset: 2000, .. })), "{error}");
    assert_eq!(incoming.next_offset(), 2000);
    receive(&mut incoming, &bytes, bytes.len());
    incoming.finish().unwrap();
}

#[test]
fn bytes_that_are_not_the_blob_are_thrown_away() {
    let ((_dir, store), mut bytes) = (store(), blob());
    let digest = Digest::of(&bytes);
    bytes[5] ^= 1;
    let mut incoming = store.receive(digest).unwrap();
    receive(&mut incoming, &bytes, bytes.len());
    let error = incoming.finish().unwrap_err();
    assert!(matches!(error, ReceiveError::Transfer(TransferError::Content { .. })), "{error}");
    assert!(files::names_in(&store.dir).unwrap().is_empty(), "nothing to resume from");
}

#[test]
fn a_truncated_download_never_gets_the_name() {
    let ((_dir, store), bytes) = (store(), blob());
    let digest = Digest::of(&bytes);
    let mut incoming = store.receive(digest).unwrap();
    receive(&mut incoming, &bytes, 3000);
    assert!(!incoming.is_complete());
    assert!(incoming.finish().is_err());
    assert!(!store.holds(digest));
}

#[test]
fn a_damaged_part_on_disk_is_found_at_the_end_and_thrown_away() {
    let ((_dir, store), bytes) = (store(), blob());
    let digest = Digest::of(&bytes);
    fs::write(store.partial(digest), vec![0; 3000]).unwrap();
    let mut incoming = store.receive(digest).unwrap();
    receive(&mut incoming, &bytes, bytes.len());
    assert!(incoming.finish().is_err());
    assert_eq!(store.receive(digest).unwrap().next_offset(), 0, "the next try begins anew");
}

#[test]
fn a_part_longer_than_the_blob_is_begun_anew() {
    let ((_dir, store), bytes) = (store(), blob());
    let digest = Digest::of(&bytes);
    fs::write(store.partial(digest), vec![0; 20_000]).unwrap();
    assert_eq!(store.receive(digest).unwrap().next_offset(), 0);
}

#[test]
fn a_blob_that_changed_on_disk_is_not_read() {
    let ((_dir, store), bytes) = (store(), blob());
    let digest = store.insert(&bytes).unwrap();
    let mut changed = bytes;
    changed[100] ^= 1;
    fs::write(store.path(digest), &changed).unwrap();
    let error = store.read(digest).unwrap_err().to_string();
    assert!(error.contains(&digest.hex()) && error.contains("the bytes have SHA-256"), "{error}");
}

#[test]
fn keeps_what_is_needed() {
    let (_dir, store) = store();
    let (one, two) = (store.insert(b"one").unwrap(), store.insert(b"two").unwrap());
    fs::write(store.partial(one), b"o").unwrap();
    fs::write(store.partial(two), b"t").unwrap();
    assert_eq!(store.usage().unwrap(), (2, 6));
    store.retain(&BTreeSet::from([one])).unwrap();
    assert!(store.holds(one) && !store.holds(two));
    assert!(store.partial(one).exists() && !store.partial(two).exists());
}

/// Runs in a child process with little room: see the two tests that follow.
#[test]
fn child_without_room() {
    let Some(dir) = std::env::var_os("FLEETUNE_TEST_SMALL_DIR") else { return };
    let (store, bytes) = (BlobStore::open(PathBuf::from(dir).join("blobs")).unwrap(), vec![7; 400_000]);
    let digest = Digest::of(&bytes);
    let error = store.insert(&bytes).unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    assert!(error.to_string().starts_with("no space left to write "), "{error}");
    let mut incoming = store.receive(digest).unwrap();
    let mut offset = 0;
    let error = loop {
        match incoming.accept(&chunk(&bytes, offset)) {
            Ok(()) => offset += CHUNK,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ReceiveError::Store(StoreError::Full { .. })), "{error}");
    drop(incoming);
    assert!(files::names_in(&store.dir).unwrap().is_empty(), "the space is given back");
    assert_eq!(store.read(store.insert(b"small").unwrap()).unwrap(), b"small", "and the store works on");
}

fn child(shell: &[&str], dir: &Path) -> std::process::Output {
    let test = std::env::current_exe().unwrap();
    let mut command = Command::new(shell[0]);
    command.args(&shell[1..]).arg(test).args(["--exact", "blobs::tests::child_without_room", "--nocapture"]);
    command.env("FLEETUNE_TEST_SMALL_DIR", dir).output().unwrap()
}

fn assert_passed(output: &std::process::Output) {
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}\n{errors}");
}

#[cfg(unix)]
#[test]
fn a_file_size_limit_is_told_and_leaves_nothing_broken() {
    let dir = tempfile::tempdir().unwrap();
    // 64 blocks of 512 or 1024 bytes, by shell; the signal that would end the process is ignored.
    let script = "trap '' XFSZ; ulimit -f 64; exec \"$@\"";
    assert_passed(&child(&["sh", "-c", script, "sh"], dir.path()));
}

/// A real full disk, where the system lets a user mount one of 128 KiB in a namespace of its own.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told_and_leaves_nothing_broken() {
    let dir = tempfile::tempdir().unwrap();
    let mount = "mount -t tmpfs -o size=128k tmpfs \"$FLEETUNE_TEST_SMALL_DIR\" || exit 77; exec \"$@\"";
    let output =
        child(&["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"], dir.path());
    let refused = String::from_utf8_lossy(&output.stderr).contains("unshare");
    if refused || output.status.code() == Some(77) {
        eprintln!("NOT RUN: this system lets nobody mount a small disk");
        return;
    }
    assert_passed(&output);
}
