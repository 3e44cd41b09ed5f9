//! A really full disk under the coordinator: a small memory file system filled to the last byte.

use super::FOUR;
use super::fleet::{Site, wait_until};
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

/// A mounted memory file system; unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// None where this user may not mount.
    fn mount(path: PathBuf) -> Option<Self> {
        fs::create_dir_all(&path).expect("a folder");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m", "tmpfs"]).arg(&path).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(Self(path))
    }

    fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        let mut file = File::create(&path).expect("a file");
        while file.write_all(&[0; 4096]).is_ok() {}
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_stops_the_rounds_and_loses_nothing() {
    let site = Site::new(4, FOUR, 4, 1);
    let Some(disk) = SmallDisk::mount(site.path("disk")) else {
        eprintln!("NOT RUN: this user may not mount a memory file system");
        return;
    };
    move_storage(&site.path("coordinator.toml"));
    let _coordinator = site.coordinator();
    let _devices: Vec<_> = (0..4).map(|user| site.device(user, &hex::encode([7; 32]))).collect();
    wait_until("a round has finished", || site.round() >= 1);
    let filler = disk.fill();
    wait_until("the coordinator says that the disk is full", || {
        let log = site.coordinator_log();
        log.contains("No space left on device") || log.contains("disk is full")
    });
    let stuck = site.round();
    assert!(stuck < 4, "the full disk came in time");
    fs::remove_file(filler).expect("room again");
    wait_until("all rounds have finished", || site.round() == 4);
    let status = site.status();
    let attempts = status["tasks"][0]["attempts"].as_array().expect("attempts");
    let finished =
        |round: u64| attempts.iter().filter(|a| a["round"] == round && a["outcome"] == "Finished").count();
    assert_eq!((0..4).map(finished).collect::<Vec<_>>(), [1; 4], "each round counts once: {attempts:?}");
}

fn move_storage(config: &Path) {
    let text = fs::read_to_string(config).expect("the configuration");
    let storage = "[storage]\ndatabase = \"disk/coordinator.sqlite\"\nblobs = \"disk/blobs\"\n[pace]";
    fs::write(config, text.replace("[pace]", storage)).expect("the configuration");
}
