//! Other processes on a device, as the driver's management library tells them.

use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;

/// A process that has a context on the device.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Neighbour {
    pid: u32,
    /// Of its program; none where it runs in another container.
    name: Option<String>,
    /// Memory it holds, where the library tells.
    bytes: Option<u64>,
}

/// One line about the processes that share the device of this UUID with this one; none where there are none, or nobody tells.
pub(super) fn on_device(uuid: [u8; 16]) -> Option<String> {
    let nvml = Nvml::init().ok()?;
    let device = nvml.device_by_uuid(uuid_text(uuid)).ok()?;
    let processes = device.running_compute_processes().ok()?;
    let others = processes.iter().filter(|process| process.pid != std::process::id());
    let neighbours = others.map(|process| Neighbour {
        pid: process.pid,
        name: process_name(process.pid),
        bytes: match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        },
    });
    described(&neighbours.collect::<Vec<_>>())
}

fn process_name(pid: u32) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).ok().map(|name| name.trim().to_owned())
}

fn described(neighbours: &[Neighbour]) -> Option<String> {
    let one = |neighbour: &Neighbour| {
        let name = neighbour.name.as_ref().map_or_else(String::new, |name| format!(" ({name})"));
        let bytes = neighbour
            .bytes
            .map_or_else(String::new, |bytes| format!(" holds {:.2} GiB", bytes as f64 / f64::from(1 << 30)));
        format!("process {}{name}{bytes}", neighbour.pid)
    };
    let all: Vec<String> = neighbours.iter().map(one).collect();
    (!all.is_empty()).then(|| format!("others use the same GPU: {}", all.join(", ")))
}

/// As the library writes it.
fn uuid_text(uuid: [u8; 16]) -> String {
    let hex = |range: std::ops::Range<usize>| -> String {
        uuid[range].iter().map(|byte| format!("{byte:02x}")).collect()
    };
    format!("GPU-{}-{}-{}-{}-{}", hex(0..4), hex(4..6), hex(6..8), hex(8..10), hex(10..16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_named_with_what_is_known_of_them() {
        let known = Neighbour { pid: 12, name: Some("python".to_owned()), bytes: Some(3 << 29) };
        let unknown = Neighbour { pid: 7, name: None, bytes: None };
        assert_eq!(
            described(&[known, unknown]).unwrap(),
            "others use the same GPU: process 12 (python) holds 1.50 GiB, process 7"
        );
        assert_eq!(described(&[]), None);
    }

    #[test]
    fn identities_are_written_as_the_library_does() {
        let uuid = [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0, 1, 2, 3, 4, 5, 6, 0xff];
        assert_eq!(uuid_text(uuid), "GPU-01234567-89ab-cdef-0001-0203040506ff");
    }
}
