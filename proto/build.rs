//! Compiles the schema with protox: no protoc to install.

use std::{env, error::Error, fs, path::PathBuf};

const FILES: [&str; 6] = [
    "fleetune/v1/common.proto",
    "fleetune/v1/plan.proto",
    "fleetune/v1/task_service.proto",
    "fleetune/v1/aggregation_service.proto",
    "fleetune/v1/blob_service.proto",
    "fleetune/v1/release_service.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=schema");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut compiler = protox::Compiler::new(["schema"])?;
    compiler.include_imports(true).open_files(FILES)?;
    fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure()
        .build_transport(false)
        .skip_debug(["fleetune.v1.RevealedShare"])
        .build_client(env::var_os("CARGO_FEATURE_CLIENT").is_some())
        .build_server(env::var_os("CARGO_FEATURE_SERVER").is_some())
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
