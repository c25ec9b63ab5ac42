//! Compiles the .proto files with protox, a compiler in pure Rust: building Quartet needs no protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["v3/generate.proto", "control/control.proto"];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;
    tonic_prost_build::configure().build_client(true).build_server(true).compile_fds(descriptors)?;
    Ok(())
}
