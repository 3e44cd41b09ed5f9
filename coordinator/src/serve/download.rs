//! Streams a blob from disk in chunks. Its bytes are hashed before the first stream of this process.

use super::shell::Shell;
use crate::limits::DOWNLOAD_IDLE_MS_MAX;
use fleetune_proto::{CHUNK_BYTES_MAX, Digest, transfer::chunk_at, wire};
use sha2::{Digest as _, Sha256};
use std::{
    io::{Read, SeekFrom},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    time::Duration,
};
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncSeekExt},
    sync::{OwnedSemaphorePermit, mpsc},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// The chunks of one download.
pub(super) type Chunks = ReceiverStream<Result<wire::ReadBlobResponse, Status>>;

/// Chunks read ahead of the network.
const READ_AHEAD: usize = 2;

pub(super) async fn read_blob(shell: &Arc<Shell>, request: wire::ReadBlobRequest) -> Result<Chunks, Status> {
    let digest = Digest::parse("read_blob.digest", request.digest)
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
    if request.offset > digest.size {
        let problem = format!("read_blob.offset: {} of a blob of {} bytes", request.offset, digest.size);
        return Err(Status::invalid_argument(problem));
    }
    let permit = shell.downloads.clone().try_acquire_owned();
    let permit = permit.map_err(|_| Status::resource_exhausted("downloads_max downloads are under way"))?;
    let path = shell.bases.get(&digest).cloned().unwrap_or_else(|| shell.store.blobs().path(&digest));
    verify(shell, digest, &path).await?;
    let mut file = File::open(&path).await.map_err(|error| unreadable(digest, &error))?;
    file.seek(SeekFrom::Start(request.offset)).await.map_err(|error| unreadable(digest, &error))?;
    let (sender, receiver) = mpsc::channel(READ_AHEAD);
    tokio::spawn(send(Download { digest, file, offset: request.offset, _permit: permit }, sender));
    Ok(ReceiverStream::new(receiver))
}

struct Download {
    digest: Digest,
    file: File,
    offset: u64,
    _permit: OwnedSemaphorePermit,
}

async fn send(mut download: Download, sender: mpsc::Sender<Result<wire::ReadBlobResponse, Status>>) {
    while download.offset < download.digest.size {
        let chunk = download.next().await.map_err(|error| unreadable(download.digest, &error));
        let failed = chunk.is_err();
        let idle = Duration::from_millis(DOWNLOAD_IDLE_MS_MAX);
        if sender.send_timeout(chunk, idle).await.is_err() || failed {
            return;
        }
    }
}

impl Download {
    async fn next(&mut self) -> std::io::Result<wire::ReadBlobResponse> {
        let left = self.digest.size - self.offset;
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK_BYTES_MAX);
        let mut data = vec![0; length];
        self.file.read_exact(&mut data).await?;
        let offset = self.offset;
        self.offset += length as u64;
        let crc32c = chunk_at(&data, 0).1;
        Ok(wire::ReadBlobResponse { offset, data, crc32c })
    }
}

/// Hashes a blob once: a damaged disk is the operator's to mend, not the devices' to find out.
async fn verify(shell: &Arc<Shell>, digest: Digest, path: &Path) -> Result<(), Status> {
    if shell.verified.lock().unwrap_or_else(PoisonError::into_inner).contains(&digest) {
        return Ok(());
    }
    let hashed = path.to_owned();
    let actual = tokio::task::spawn_blocking(move || hash(&hashed)).await;
    let actual = actual.map_err(|error| Status::internal(error.to_string()))?;
    let actual = actual.map_err(|error| unreadable(digest, &error))?;
    if actual != digest {
        tracing::error!(blob = %digest, path = %path.display(), actual = %actual, "stored blob is damaged");
        return Err(Status::data_loss(format!("blob {digest}: the stored bytes are damaged")));
    }
    shell.verified.lock().unwrap_or_else(PoisonError::into_inner).insert(digest);
    Ok(())
}

fn hash(path: &PathBuf) -> std::io::Result<Digest> {
    let mut file = std::fs::File::open(path)?;
    let (mut hasher, mut size) = (Sha256::new(), 0);
    let mut buffer = vec![0; CHUNK_BYTES_MAX];
    loop {
        let length = file.read(&mut buffer)?;
        if length == 0 {
            return Ok(Digest { sha256: hasher.finalize().into(), size });
        }
        hasher.update(&buffer[..length]);
        size += length as u64;
    }
}

fn unreadable(digest: Digest, error: &std::io::Error) -> Status {
    if error.kind() == std::io::ErrorKind::NotFound {
        return Status::not_found(format!("blob {digest}: not here"));
    }
    tracing::error!(blob = %digest, %error, "stored blob cannot be read");
    Status::data_loss(format!("blob {digest}: cannot be read"))
}
