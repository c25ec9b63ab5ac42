//! CUDA kernels, compiled ahead of time.
//!
//! The sources are `cuda/*.cu`. Where there is an `nvcc` the build script compiles each of them into one fatbin with
//! machine code for every architecture asked for, and this crate embeds them; without one it is empty, and whoever wants
//! to run on a GPU is told so at start. Nothing is compiled at run time.

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// What the embedded kernels run on, e.g. `sm_90a`; `compute_80` is portable code that the driver compiles. Empty when the
/// build had no `nvcc`.
pub fn architectures() -> &'static [&'static str] {
    ARCHITECTURES
}

/// The image made of `cuda/{name}.cu`, for `cuModuleLoadData`; none when there is no such file or the build had no `nvcc`.
pub fn fatbin(name: &str) -> Option<&'static [u8]> {
    FATBINS.iter().find(|(known, _)| *known == name).map(|(_, image)| *image)
}

/// Names of the images there are.
pub fn names() -> impl Iterator<Item = &'static str> {
    FATBINS.iter().map(|(name, _)| *name)
}
