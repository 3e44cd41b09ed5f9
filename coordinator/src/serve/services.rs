//! The four gRPC services: each call is one call of the core.

use super::{download, shell::Shell};
use fleetune_proto::wire::{
    self, aggregation_service_server::AggregationService, blob_service_server::BlobService,
    release_service_server::ReleaseService, task_service_server::TaskService,
};
use std::sync::Arc;
use tonic::{Request, Response, Status};

#[derive(Clone)]
pub(super) struct Services(pub(super) Arc<Shell>);

#[tonic::async_trait]
impl TaskService for Services {
    async fn check_in(
        &self,
        request: Request<wire::CheckInRequest>,
    ) -> Result<Response<wire::CheckInResponse>, Status> {
        self.0.call(move |core, now| core.handle_check_in(request.get_ref(), now)).await
    }

    async fn report_task_result(
        &self,
        request: Request<wire::ReportTaskResultRequest>,
    ) -> Result<Response<wire::ReportTaskResultResponse>, Status> {
        self.0.call(move |core, now| core.handle_report_task(request.get_ref(), now)).await
    }
}

#[tonic::async_trait]
impl AggregationService for Services {
    async fn submit_update(
        &self,
        request: Request<wire::SubmitUpdateRequest>,
    ) -> Result<Response<wire::SubmitUpdateResponse>, Status> {
        self.0.call(move |core, now| core.handle_submit(request.get_ref(), now)).await
    }

    async fn advertise_keys(
        &self,
        request: Request<wire::AdvertiseKeysRequest>,
    ) -> Result<Response<wire::AdvertiseKeysResponse>, Status> {
        self.0.call(move |core, now| core.handle_advertise_keys(request.get_ref(), now)).await
    }

    async fn share_keys(
        &self,
        request: Request<wire::ShareKeysRequest>,
    ) -> Result<Response<wire::ShareKeysResponse>, Status> {
        self.0.call(move |core, now| core.handle_share_keys(request.get_ref(), now)).await
    }

    async fn submit_masked_update(
        &self,
        request: Request<wire::SubmitMaskedUpdateRequest>,
    ) -> Result<Response<wire::SubmitMaskedUpdateResponse>, Status> {
        self.0.call(move |core, now| core.handle_submit_masked(request.get_ref(), now)).await
    }

    async fn confirm_survivors(
        &self,
        request: Request<wire::ConfirmSurvivorsRequest>,
    ) -> Result<Response<wire::ConfirmSurvivorsResponse>, Status> {
        self.0.call(move |core, now| core.handle_confirm_survivors(request.get_ref(), now)).await
    }

    async fn reveal_shares(
        &self,
        request: Request<wire::RevealSharesRequest>,
    ) -> Result<Response<wire::RevealSharesResponse>, Status> {
        self.0.call(move |core, now| core.handle_reveal_shares(request.get_ref(), now)).await
    }
}

#[tonic::async_trait]
impl BlobService for Services {
    type ReadBlobStream = download::Chunks;

    async fn read_blob(
        &self,
        request: Request<wire::ReadBlobRequest>,
    ) -> Result<Response<Self::ReadBlobStream>, Status> {
        download::read_blob(&self.0, request.into_inner()).await.map(Response::new)
    }

    async fn write_blob_chunk(
        &self,
        request: Request<wire::WriteBlobChunkRequest>,
    ) -> Result<Response<wire::WriteBlobChunkResponse>, Status> {
        self.0.call(move |core, now| core.handle_write_chunk(request.get_ref(), now)).await
    }
}

#[tonic::async_trait]
impl ReleaseService for Services {
    async fn report_release(
        &self,
        request: Request<wire::ReportReleaseRequest>,
    ) -> Result<Response<wire::ReportReleaseResponse>, Status> {
        self.0.call(move |core, now| core.handle_report_release(request.get_ref(), now)).await
    }
}
