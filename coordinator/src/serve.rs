//! The shell around the core: it moves bytes and time, and decides nothing.
//!
//! `serve/start.rs` builds a core from configuration and store, `serve/services.rs` answers gRPC,
//! `serve/download.rs` streams blobs, `serve/keeper.rs` keeps deadlines and commits.

mod clock;
mod download;
mod keeper;
mod services;
mod shell;
mod start;

use crate::{
    CoreError,
    config::{Config, ConfigError, Listen},
    limits::{MESSAGE_BYTES_MAX, SHUTDOWN_MS_MAX},
    store::StoreError,
};
use fleetune_model::error::{AdapterError, ModelError};
use fleetune_proto::{
    Name,
    wire::{
        aggregation_service_server::AggregationServiceServer, blob_service_server::BlobServiceServer,
        release_service_server::ReleaseServiceServer, task_service_server::TaskServiceServer,
    },
};
use services::Services;
use shell::Shell;
use std::{future::Future, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};
use thiserror::Error;
use tokio::{net::TcpListener, sync::watch};
use tonic::transport::{Identity, Server as Transport, ServerTlsConfig, server::TcpIncoming};

/// Why a coordinator does not start, or stops.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Stored state.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A task or release.
    #[error(transparent)]
    Core(#[from] CoreError),
    /// A base model.
    #[error("base model {}: {source}", path.display())]
    Base {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        source: ModelError,
    },
    /// A stored checkpoint does not fit the task as it is configured now.
    #[error("task {task}: the stored checkpoint cannot be resumed: {source}")]
    Resume {
        /// The task.
        task: Name,
        /// What does not fit.
        source: AdapterError,
    },
    /// A file that is needed to start.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Plaintext beyond this machine was not asked for by name.
    #[error(
        "listen.address {0}: plaintext is served on loopback addresses only; set certificate_file and key_file, or insecure_plaintext_listen"
    )]
    Plaintext(SocketAddr),
    /// The address cannot be listened on.
    #[error("listen.address {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// TLS or HTTP/2.
    #[error("transport: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// The core stopped in the middle of a change: the state in memory is in doubt, the stored one is not.
    #[error("the core panicked; start again from the last checkpoint")]
    Panicked,
}

/// A coordinator that listens.
pub struct Server {
    shell: Arc<Shell>,
    listener: TcpListener,
    address: SocketAddr,
    listen: Listen,
}

impl Server {
    /// Opens the store, takes up all tasks and listens on `address` (or the configured one). Port 0 takes a
    /// free port.
    ///
    /// # Errors
    /// [`ServeError`] says which part does not start.
    pub async fn bind(config: &Config, address: Option<SocketAddr>) -> Result<Self, ServeError> {
        let listen = Listen { address: address.unwrap_or(config.listen.address), ..config.listen.clone() };
        let address = listen.address;
        if !listen.is_tls() && !listen.insecure_plaintext_listen && !address.ip().is_loopback() {
            return Err(ServeError::Plaintext(address));
        }
        let shell = Arc::new(start::shell(config).await?);
        let failed = |source| ServeError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { shell, listener, address, listen })
    }

    /// The address that is listened on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown`, then lets calls under way end and keeps what is to be kept.
    ///
    /// # Errors
    /// [`ServeError::Transport`], or [`ServeError::Panicked`].
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), ServeError> {
        let (stop, stopping) = watch::channel(false);
        let mut keeper = tokio::spawn(keeper::run(self.shell.clone(), stopping.clone()));
        let mut transport = tokio::spawn(self.transport(stopping)?);
        let ended = tokio::select! {
            () = shutdown => None,
            ended = &mut keeper => Some(ended.unwrap_or(Err(ServeError::Panicked))),
            ended = &mut transport => Some(ended.map_or(Err(ServeError::Panicked), |ended| Ok(ended?))),
        };
        if let Some(ended) = ended {
            return ended;
        }
        let _ = stop.send(true);
        if tokio::time::timeout(Duration::from_millis(SHUTDOWN_MS_MAX), transport).await.is_err() {
            tracing::warn!("calls under way did not end in time and were cut");
        }
        keeper.await.unwrap_or(Err(ServeError::Panicked))
    }

    fn transport(
        self,
        mut stopping: watch::Receiver<bool>,
    ) -> Result<impl Future<Output = Result<(), tonic::transport::Error>> + Send + 'static, ServeError> {
        let mut builder = Transport::builder().timeout(Duration::from_millis(self.listen.call_timeout_ms));
        if self.listen.is_tls() {
            builder = builder.tls_config(ServerTlsConfig::new().identity(identity(&self.listen)?))?;
        }
        let services = Services(self.shell);
        let router = builder
            .add_service(
                TaskServiceServer::new(services.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            )
            .add_service(
                AggregationServiceServer::new(services.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            )
            .add_service(
                BlobServiceServer::new(services.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            )
            .add_service(ReleaseServiceServer::new(services).max_decoding_message_size(MESSAGE_BYTES_MAX));
        let incoming = TcpIncoming::from(self.listener).with_nodelay(Some(true));
        let stopped = async move {
            let _ = stopping.wait_for(|stop| *stop).await;
        };
        Ok(router.serve_with_incoming_shutdown(incoming, stopped))
    }
}

fn identity(listen: &Listen) -> Result<Identity, ServeError> {
    let read = |path: &PathBuf| {
        std::fs::read(path).map_err(|source| ServeError::Read { path: path.clone(), source })
    };
    Ok(Identity::from_pem(read(&listen.certificate_file)?, read(&listen.key_file)?))
}
