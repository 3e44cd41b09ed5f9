//! Switching releases, and every way not to.

use super::*;
use crate::fixture::{BASE, base, base_bytes, manifest, release_adapter};

struct Disk {
    dir: tempfile::TempDir,
    blobs: BlobStore,
    adapter: Vec<u8>,
}

fn disk() -> Disk {
    let dir = tempfile::tempdir().unwrap();
    let blobs = BlobStore::open(blobs::in_state(dir.path())).unwrap();
    let adapter = release_adapter(&base());
    blobs.insert(&BASE).unwrap();
    blobs.insert(&adapter).unwrap();
    Disk { dir, blobs, adapter }
}

impl Disk {
    fn slots(&self) -> ReleaseSlots {
        ReleaseSlots::open(self.dir.path()).unwrap()
    }

    fn manifest(&self, version: u64) -> ReleaseManifest {
        manifest(version, &self.adapter)
    }

    fn versions(&self) -> (Option<u64>, Option<u64>, u64) {
        let ReleaseVersions { active, previous, version_max } = self.slots().versions();
        (active, previous, version_max)
    }
}

#[test]
fn a_new_device_has_no_model() {
    let disk = disk();
    assert_eq!(disk.versions(), (None, None, 0));
    assert!(disk.slots().open_model().unwrap().is_none());
}

#[test]
fn switches_and_keeps_the_one_before() {
    let disk = disk();
    let mut slots = disk.slots();
    slots.install(&disk.manifest(1)).unwrap();
    slots.install(&disk.manifest(4)).unwrap();
    assert_eq!(disk.versions(), (Some(4), Some(1), 4));
    assert_eq!(disk.slots().open_model().unwrap().unwrap().manifest, disk.manifest(4));
    slots.install(&disk.manifest(5)).unwrap();
    slots.prune(&[]).unwrap();
    assert_eq!(disk.versions(), (Some(5), Some(4), 5));
    assert_eq!(files::names_in(&disk.dir.path().join("releases")).unwrap(), ["4", "5"]);
}

#[test]
fn never_goes_back() {
    let disk = disk();
    let mut slots = disk.slots();
    slots.install(&disk.manifest(3)).unwrap();
    for version in [1, 3] {
        let error = slots.install(&disk.manifest(version)).unwrap_err();
        assert!(
            matches!(error, ReleaseError::Rollback { version_max: 3, .. }) && error.is_final(),
            "{error}"
        );
    }
    slots.reject(7).unwrap();
    assert!(disk.slots().install(&disk.manifest(7)).is_err(), "refused once is refused for good");
    assert_eq!(disk.versions(), (Some(3), None, 7));
}

#[test]
fn a_crash_between_the_steps_leaves_the_old_one_serving() {
    let disk = disk();
    let mut slots = disk.slots();
    slots.install(&disk.manifest(1)).unwrap();
    slots.stage(&disk.manifest(2)).unwrap();
    drop(slots);
    assert_eq!(disk.versions(), (Some(1), None, 1), "staged is not active");
    let pointer = disk.dir.path().join("active.tmp");
    fs::write(&pointer, "{\"active\":2,\"prev").unwrap();
    let mut slots = disk.slots();
    assert_eq!(slots.open_model().unwrap().unwrap().manifest.version, 1, "a torn pointer has no name");
    slots.install(&disk.manifest(2)).unwrap();
    assert!(!pointer.exists());
    assert_eq!(disk.versions(), (Some(2), Some(1), 2));
}

#[test]
fn models_that_do_not_open_do_not_serve() {
    let disk = disk();
    let mut slots = disk.slots();
    slots.install(&disk.manifest(1)).unwrap();
    let other = BaseModel::from_gguf_bytes(base_bytes(2)).unwrap();
    let foreign = release_adapter(&other);
    let broken = disk.adapter[..disk.adapter.len() / 2].to_vec();
    for (adapter, expected) in [(foreign, "bound to base"), (broken, "release 2: adapter")] {
        disk.blobs.insert(&adapter).unwrap();
        let error = slots.install(&manifest(2, &adapter)).unwrap_err();
        assert!(error.is_final() && error.to_string().contains(expected), "{error}");
    }
    let cut = disk.blobs.insert(&BASE[..BASE.len() / 2]).unwrap();
    let error = slots.install(&ReleaseManifest { base_model: cut, ..disk.manifest(2) }).unwrap_err();
    assert!(matches!(error, ReleaseError::Base { .. }), "{error}");
    assert_eq!(disk.versions(), (Some(1), None, 1));
}

#[test]
fn a_fully_trained_model_serves_alone_and_takes_turns_with_adapters() {
    let disk = disk();
    let mut slots = disk.slots();
    slots.install(&disk.manifest(1)).unwrap();
    let trained = base_bytes(2);
    let whole = |version, bytes: &[u8]| ReleaseManifest {
        base_model: Digest::of(bytes),
        adapter: None,
        ..disk.manifest(version)
    };
    let missing = slots.install(&whole(2, &trained)).unwrap_err();
    assert!(matches!(missing, ReleaseError::Base { .. }), "{missing}");
    disk.blobs.insert(&trained).unwrap();
    slots.install(&whole(2, &trained)).unwrap();
    let model = disk.slots().open_model().unwrap().unwrap();
    assert!(model.adapter.is_none() && model.base.sha256 == Digest::of(&trained).sha256);
    slots.prune(&[]).unwrap();
    assert!(disk.blobs.read(Digest::of(&disk.adapter)).is_ok(), "the release before is kept");
    let mut broken = trained.clone();
    let half = broken.len() / 2;
    broken[half..].chunks_exact_mut(2).for_each(|pair| pair.copy_from_slice(&[0xff, 0x7f]));
    disk.blobs.insert(&broken).unwrap();
    let error = slots.install(&whole(3, &broken)).unwrap_err();
    assert!(error.is_final(), "scales that are no numbers do not serve: {error}");
    slots.install(&disk.manifest(4)).unwrap();
    slots.prune(&[]).unwrap();
    assert_eq!(disk.versions(), (Some(4), Some(2), 4));
    assert!(disk.blobs.read(Digest::of(&trained)).is_ok());
}

#[test]
fn a_blob_that_changed_on_disk_is_the_disks_fault() {
    let disk = disk();
    let mut changed = disk.adapter.clone();
    *changed.last_mut().unwrap() ^= 1;
    fs::write(disk.blobs.path(Digest::of(&disk.adapter)), changed).unwrap();
    let error = disk.slots().install(&disk.manifest(1)).unwrap_err();
    assert!(!error.is_final(), "the release may be tried again: {error}");
}

#[test]
fn the_previous_release_serves_when_the_active_one_rots() {
    let disk = disk();
    let mut slots = disk.slots();
    slots.install(&disk.manifest(1)).unwrap();
    slots.install(&disk.manifest(2)).unwrap();
    fs::write(slots.manifest_path(2), "rot").unwrap();
    assert_eq!(disk.slots().open_model().unwrap().unwrap().manifest.version, 1);
    fs::write(slots.manifest_path(1), "rot").unwrap();
    let error = disk.slots().open_model().unwrap_err().to_string();
    assert!(error.contains("releases/2/manifest"), "{error}");
}

#[test]
fn prunes_to_the_two_releases_and_what_is_needed() {
    let disk = disk();
    let mut slots = disk.slots();
    slots.install(&disk.manifest(1)).unwrap();
    let (old, needed) = (disk.blobs.insert(b"old").unwrap(), disk.blobs.insert(b"needed").unwrap());
    slots.prune(&[needed]).unwrap();
    assert!(disk.blobs.holds(needed) && !disk.blobs.holds(old));
    assert!(slots.open_model().unwrap().is_some());
}

#[test]
fn a_damaged_pointer_is_told() {
    let disk = disk();
    fs::write(disk.dir.path().join("active"), "{\"active\":").unwrap();
    let error = ReleaseSlots::open(disk.dir.path()).unwrap_err().to_string();
    assert!(error.contains("active: EOF"), "{error}");
}
