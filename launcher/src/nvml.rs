//! What the NVIDIA driver's library says about the devices. It is loaded when it is there; nothing is needed to build.

use std::path::Path;

use nvml_wrapper::enum_wrappers::device::{P2pCapabilitiesIndex, P2pStatus};
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use nvml_wrapper::{Device, Nvml};

use crate::machine::{Gpu, GpuProcess, GpuSlice, Unreachable};

/// What the library tells; nothing where it is missing or does not answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Of the driver.
    pub driver: Option<String>,
    /// The newest CUDA it runs: 13000 is 13.0.
    pub cuda_version: Option<u32>,
    /// In the order of their buses. Devices of another container are not among them.
    pub gpus: Vec<Gpu>,
}

/// Asks the library, which is closed again. It makes no context on any device.
pub fn read() -> Found {
    let nvml = match Nvml::init() {
        Ok(nvml) => nvml,
        Err(error) => {
            tracing::debug!("the NVIDIA driver's library does not answer: {error}");
            return Found::default();
        }
    };
    let count = nvml.device_count().unwrap_or(0);
    let devices: Vec<Device<'_>> = (0..count).filter_map(|index| nvml.device_by_index(index).ok()).collect();
    Found {
        driver: nvml.sys_driver_version().ok(),
        cuda_version: nvml.sys_cuda_driver_version().ok().and_then(|version| version.try_into().ok()),
        gpus: devices.iter().filter_map(|device| gpu(device, &devices)).collect(),
    }
}

/// One of `devices`; none where it does not even tell its name.
fn gpu(device: &Device<'_>, devices: &[Device<'_>]) -> Option<Gpu> {
    let memory = device.memory_info().ok();
    Some(Gpu {
        uuid: device.uuid().ok()?,
        name: device.name().ok()?,
        memory_bytes: memory.as_ref().map_or(0, |memory| memory.total),
        free_bytes: memory.as_ref().map_or(0, |memory| memory.free),
        processes: device.running_compute_processes().unwrap_or_default().iter().map(process).collect(),
        slices: slices(device),
        unreachable: devices.iter().filter_map(|other| unreachable(device, other)).collect(),
    })
}

/// `other`, if the driver says that `device` cannot exchange memory with it. A driver that does not tell says nothing.
fn unreachable(device: &Device<'_>, other: &Device<'_>) -> Option<Unreachable> {
    let uuid = other.uuid().ok()?;
    if device.uuid().ok()? == uuid {
        return None;
    }
    let ways = [P2pCapabilitiesIndex::Read, P2pCapabilitiesIndex::Write];
    let mut answers = ways.into_iter().filter_map(|way| device.p2p_status(other, way).ok());
    let why = answers.find_map(obstacle)?.to_owned();
    Some(Unreachable { uuid, why })
}

/// What stands between two devices.
fn obstacle(status: P2pStatus) -> Option<&'static str> {
    match status {
        P2pStatus::Ok | P2pStatus::Unknown => None,
        P2pStatus::ChipsetNotSupported => Some("the chipset does not allow it"),
        P2pStatus::GpuNotSupported => Some("this kind of GPU does not do it"),
        P2pStatus::IohTopologyNotSupported => Some("they are behind different I/O hubs"),
        P2pStatus::DisabledByRegkey => Some("the driver is configured not to"),
        P2pStatus::NotSupported => Some("it is not supported"),
    }
}

fn process(process: &ProcessInfo) -> GpuProcess {
    GpuProcess {
        pid: process.pid,
        name: process_name(process.pid),
        bytes: match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        },
    }
}

/// Its name in this container's `/proc`, if the process of this number is one that has a device open: the driver counts the
/// processes of the machine, which have other numbers here.
fn process_name(pid: u32) -> Option<String> {
    let mut files = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    files.find(|file| {
        std::fs::read_link(file.path()).is_ok_and(|path| path.starts_with("/dev") && is_nvidia(&path))
    })?;
    Some(std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned())
}

fn is_nvidia(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("nvidia"))
}

fn slices(device: &Device<'_>) -> Vec<GpuSlice> {
    let most = device.mig_device_count().unwrap_or(0);
    let slices = (0..most).filter_map(|index| device.mig_device_by_index(index).ok());
    slices
        .filter_map(|slice| {
            let memory = slice.memory_info().ok();
            Some(GpuSlice {
                uuid: slice.uuid().ok()?,
                memory_bytes: memory.as_ref().map_or(0, |memory| memory.total),
                free_bytes: memory.as_ref().map_or(0, |memory| memory.free),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_empty_answer_and_a_present_one_names_its_devices() {
        let found = read();
        assert!(found.gpus.is_empty() || found.driver.is_some());
        assert!(found.gpus.iter().all(|gpu| gpu.uuid.starts_with("GPU-") && !gpu.name.is_empty()));
    }

    #[test]
    fn only_what_the_driver_denies_is_an_obstacle() {
        assert_eq!([P2pStatus::Ok, P2pStatus::Unknown].map(obstacle), [None, None]);
        for status in [
            P2pStatus::ChipsetNotSupported,
            P2pStatus::GpuNotSupported,
            P2pStatus::IohTopologyNotSupported,
            P2pStatus::DisabledByRegkey,
            P2pStatus::NotSupported,
        ] {
            assert!(obstacle(status).is_some(), "{status:?}");
        }
    }

    #[test]
    fn processes_have_sizes_and_names_where_they_are_certain() {
        let info = |pid, used_gpu_memory| ProcessInfo {
            pid,
            used_gpu_memory,
            gpu_instance_id: None,
            compute_instance_id: None,
        };
        let own = process(&info(std::process::id(), UsedGpuMemory::Used(5)));
        assert_eq!(own.bytes, Some(5));
        assert_eq!(own.name, None, "this process has no device open, so it cannot be the one that is meant");
        assert!(is_nvidia(Path::new("/dev/nvidia0")) && !is_nvidia(Path::new("/dev/null")));
        let gone = process(&info(u32::MAX, UsedGpuMemory::Unavailable));
        assert_eq!((gone.name, gone.bytes), (None, None));
    }
}
