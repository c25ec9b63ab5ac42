//! Which GPUs this launcher may use: the variables of CUDA and of container runtimes, against what the driver lists.

use crate::args::HiddenArgs;
use crate::machine::{Gpu, Machine};

/// One GPU, or a slice of one, that a rank can be given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VisibleDevice {
    /// What `CUDA_VISIBLE_DEVICES` of the rank is set to.
    pub id: String,
    /// What the driver says about it, where it does.
    pub gpu: Option<Gpu>,
}

/// The GPUs this launcher may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Visible {
    /// In the order of the ranks.
    pub devices: Vec<VisibleDevice>,
    /// A variable says how many there are, so that many shards are the default, as upstream.
    pub is_named: bool,
    /// Which variable, with its value, or the driver; for messages.
    pub origin: String,
}

/// Reads the variables. `CUDA_VISIBLE_DEVICES` is the last word; without it, `NVIDIA_VISIBLE_DEVICES` chooses; without both,
/// all devices are there.
///
/// # Errors
/// One line for each thing in them that names no device.
pub fn visible(variables: &HiddenArgs, machine: &Machine) -> Result<Visible, Vec<String>> {
    if let Some(list) = &variables.cuda_visible_devices {
        let origin = format!("CUDA_VISIBLE_DEVICES={list}");
        let is_by_bus = variables.cuda_device_order.as_deref() == Some("PCI_BUS_ID");
        let devices = cuda_list(list, machine, is_by_bus).map_err(|problems| {
            let line = |problem| format!("{origin}: {problem}");
            problems.into_iter().map(line).collect::<Vec<_>>()
        })?;
        return Ok(Visible { devices, is_named: true, origin });
    }
    let Some(list) = &variables.nvidia_visible_devices else {
        return Ok(Visible {
            devices: all(machine),
            is_named: false,
            origin: "the NVIDIA driver".to_owned(),
        });
    };
    let origin = format!("NVIDIA_VISIBLE_DEVICES={list}");
    Ok(Visible { devices: container_list(list.trim(), machine), is_named: true, origin })
}

/// Every device, by its UUID: unlike a number it means the same in every order.
fn all(machine: &Machine) -> Vec<VisibleDevice> {
    let known = |gpu: &Gpu| VisibleDevice { id: gpu.uuid.clone(), gpu: Some(gpu.clone()) };
    machine.gpus.iter().map(known).collect()
}

/// CUDA's rules: an empty list or a negative number ends it, names are numbers, UUIDs or beginnings of UUIDs.
fn cuda_list(list: &str, machine: &Machine, is_by_bus: bool) -> Result<Vec<VisibleDevice>, Vec<String>> {
    let items = list.split(',').map(str::trim);
    let items: Vec<&str> = items.take_while(|item| !item.is_empty() && !item.starts_with('-')).collect();
    let mut problems = Vec::new();
    let mut devices: Vec<VisibleDevice> = Vec::new();
    for item in items {
        let gpu = match find(item, machine, is_by_bus) {
            Ok(gpu) => gpu,
            Err(problem) => {
                problems.push(problem);
                continue;
            }
        };
        // CUDA shows no device at all when one is named twice. Slices have the same card.
        let is_same = |other: &&VisibleDevice| {
            other.id == item
                || (gpu.is_some()
                    && other.gpu.as_ref().map(|gpu| &gpu.uuid) == gpu.as_ref().map(|gpu| &gpu.uuid))
        };
        if let Some(other) = devices.iter().find(is_same) {
            problems.push(format!("{} and {item} name the same device; expected each once", other.id));
            continue;
        }
        devices.push(VisibleDevice { id: item.to_owned(), gpu });
    }
    if problems.is_empty() { Ok(devices) } else { Err(problems) }
}

/// What the driver says about the device `item`; nothing where it lists none, or where the number may mean another.
fn find(item: &str, machine: &Machine, is_by_bus: bool) -> Result<Option<Gpu>, String> {
    let gpus = &machine.gpus;
    if let Ok(index) = item.parse::<usize>() {
        // CUDA counts the fastest first unless it is told otherwise: the driver's numbers are those of equal cards only.
        let is_certain = is_by_bus || gpus.iter().all(|gpu| gpu.name == gpus[0].name);
        return match gpus.get(index) {
            _ if gpus.is_empty() => Ok(None),
            Some(gpu) => Ok(is_certain.then(|| gpu.clone())),
            None => Err(format!(
                "there is no device {index}; this machine has {}, numbered from 0",
                count_of(gpus.len())
            )),
        };
    }
    if !item.starts_with("GPU-") && !item.starts_with("MIG-") {
        return Err(format!("{item:?} is no device; expected numbers or UUIDs that begin with GPU- or MIG-"));
    }
    if gpus.is_empty() {
        return Ok(None);
    }
    // The old spelling of a slice names its card: MIG-GPU-UUID/instance/instance.
    let card = item.strip_prefix("MIG-").filter(|rest| rest.starts_with("GPU-"));
    let name = card.map_or(item, |card| card.split('/').next().unwrap_or(card));
    let slices = || gpus.iter().flat_map(|gpu| gpu.slices.iter().map(move |slice| (gpu, slice)));
    let mut found: Vec<Gpu> = gpus.iter().filter(|gpu| gpu.uuid.starts_with(name)).cloned().collect();
    if card.is_some() && found.len() == 1 {
        // Which slice it is, and so its memory, is not known from this spelling.
        return Ok(None);
    }
    found.extend(slices().filter(|(_, slice)| slice.uuid.starts_with(name)).map(|(gpu, slice)| Gpu {
        uuid: slice.uuid.clone(),
        memory_bytes: slice.memory_bytes,
        free_bytes: slice.free_bytes,
        slices: Vec::new(),
        // The driver tells who uses the card, not who uses the slice.
        processes: Vec::new(),
        ..gpu.clone()
    }));
    match found.len() {
        0 => Err(format!("no device of this machine is {item}; `nvidia-smi -L` lists them")),
        1 => Ok(found.pop()),
        several => Err(format!("{item} is the beginning of {several} devices' names; expected one")),
    }
}

/// A container runtime's choice. Where it was made, the driver lists those devices only and counts them anew.
fn container_list(list: &str, machine: &Machine) -> Vec<VisibleDevice> {
    match list {
        "all" | "void" => return all(machine),
        "none" | "" => return Vec::new(),
        _ => {}
    }
    let items: Vec<&str> = list.split(',').map(str::trim).collect();
    if machine.gpus.is_empty() {
        let unknown = |index: usize| VisibleDevice { id: index.to_string(), gpu: None };
        return (0..items.len()).map(unknown).collect();
    }
    // Set by hand, outside of a container, it still means these devices.
    if machine.gpus.len() > items.len() {
        let chosen: Option<Vec<_>> = items
            .iter()
            .map(|item| find(item, machine, true).ok().flatten())
            .map(|gpu| gpu.map(|gpu| VisibleDevice { id: gpu.uuid.clone(), gpu: Some(gpu) }))
            .collect();
        if let Some(chosen) = chosen {
            return chosen;
        }
    }
    all(machine)
}

/// A number of devices, in words.
pub(crate) fn count_of(count: usize) -> String {
    match count {
        0 => "none".to_owned(),
        1 => "1 device".to_owned(),
        _ => format!("{count} devices"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::GpuSlice;

    fn machine(count: usize) -> Machine {
        let gpu = |index: usize| Gpu {
            uuid: format!("GPU-{index}aaa-0000"),
            name: "NVIDIA H100".to_owned(),
            slices: vec![GpuSlice { uuid: format!("MIG-{index}bbb"), memory_bytes: 10, free_bytes: 9 }],
            ..Gpu::default()
        };
        Machine { gpus: (0..count).map(gpu).collect(), ..Machine::default() }
    }

    fn ids(cuda: Option<&str>, nvidia: Option<&str>, machine: &Machine) -> Result<Vec<String>, Vec<String>> {
        let owned = |value: Option<&str>| value.map(str::to_owned);
        let variables = HiddenArgs {
            cuda_visible_devices: owned(cuda),
            nvidia_visible_devices: owned(nvidia),
            ..HiddenArgs::default()
        };
        let visible = visible(&variables, machine)?;
        assert_eq!(visible.is_named, cuda.or(nvidia).is_some());
        Ok(visible.devices.into_iter().map(|device| device.id).collect())
    }

    #[test]
    fn cudas_variable_is_the_last_word() {
        for (list, expected) in [
            ("0,1", &["0", "1"][..]),
            (" 3 , 2", &["3", "2"]),
            ("", &[]),
            ("-1", &[]),
            ("1,-1,2", &["1"]),
            ("0,,2", &["0"]),
            ("GPU-1aaa", &["GPU-1aaa"]),
            ("MIG-2bbb,MIG-3bbb", &["MIG-2bbb", "MIG-3bbb"]),
            ("MIG-GPU-1aaa-0000/1/0", &["MIG-GPU-1aaa-0000/1/0"]),
        ] {
            assert_eq!(ids(Some(list), Some("none"), &machine(4)).unwrap(), expected, "{list:?}");
        }
        // Without the driver's library names are taken as they are.
        assert_eq!(ids(Some("7,GPU-x"), None, &machine(0)).unwrap(), ["7", "GPU-x"]);
    }

    #[test]
    fn names_of_no_device_are_told_all_at_once() {
        for (list, expected) in [
            ("4,0,9", &["no device 4; this machine has 4 devices", "no device 9"][..]),
            ("zero", &["\"zero\" is no device"]),
            ("GPU-9", &["no device of this machine is GPU-9"]),
            ("GPU-", &["beginning of 4 devices' names"]),
            ("1,1", &["1 and 1 name the same device"]),
            ("1,GPU-1aaa", &["1 and GPU-1aaa name the same device"]),
            ("MIG-9bbb", &["no device of this machine is MIG-9bbb"]),
        ] {
            let problems = ids(Some(list), None, &machine(4)).unwrap_err();
            assert_eq!(problems.len(), expected.len(), "{list:?}: {problems:?}");
            for (problem, expected) in problems.iter().zip(expected) {
                assert!(
                    problem.starts_with("CUDA_VISIBLE_DEVICES=") && problem.contains(expected),
                    "{problem}"
                );
            }
        }
    }

    #[test]
    fn container_runtimes_choose_before_the_driver_counts() {
        let uuids = ["GPU-0aaa-0000", "GPU-1aaa-0000"];
        for (list, expected) in
            [("all", &uuids[..]), (" void ", &uuids), ("none", &[]), ("", &[]), ("6,7", &uuids)]
        {
            assert_eq!(ids(None, Some(list), &machine(2)).unwrap(), expected, "{list:?}");
        }
        assert_eq!(ids(None, Some("GPU-1aaa"), &machine(2)).unwrap(), ["GPU-1aaa-0000"]);
        assert_eq!(ids(None, Some("1"), &machine(2)).unwrap(), ["GPU-1aaa-0000"]);
        assert_eq!(ids(None, Some("5,6"), &machine(0)).unwrap(), ["0", "1"]);
        assert_eq!(ids(None, None, &machine(2)).unwrap(), uuids);
    }

    #[test]
    fn numbers_of_unlike_cards_are_passed_on_without_a_guess() {
        let mut unlike = machine(2);
        unlike.gpus[1].name = "NVIDIA L4".to_owned();
        let gpu = |order: Option<&str>| {
            let variables = HiddenArgs {
                cuda_visible_devices: Some("1".to_owned()),
                cuda_device_order: order.map(str::to_owned),
                ..HiddenArgs::default()
            };
            visible(&variables, &unlike).unwrap().devices.remove(0).gpu
        };
        assert_eq!(gpu(None), None);
        assert_eq!(gpu(Some("PCI_BUS_ID")).unwrap().name, "NVIDIA L4");
    }
}
