//! Sums and gathers of ranks on GPUs, each rank a process as in a service: on one GPU both share it, where there are two each has its
//! own. Nothing is tested where there is none, which the output says.

#![allow(clippy::print_stdout, reason = "a rank tells the test that started it what it found")]

use std::io::{BufRead, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use backend::collectives::Communicator;
use backend::collectives::shm::{Rendezvous, join};
use backend::cuda::{CudaBackend, CudaOptions, RankPath};
use backend::{Backend, BackendError, DType, StepInput, StepPart};

use crate::cases::{Random, matrix, prompt, rounded};

const RANKS: usize = 2;
/// Rows and columns: odd, around the size at which the kernel changes, and several rounds of pieces.
const SHAPES: [(usize, usize); 9] =
    [(1, 1), (1, 3), (1, 4096), (7, 577), (32, 4096), (63, 4161), (64, 4096), (65, 4099), (512, 8192)];

/// One rank of a test, told what to do by one line on its standard input: rank, device, way, task, socket.
#[test]
#[ignore = "started by the tests below"]
fn rank_process() {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    let &[rank, device, path, task, socket] = words.as_slice() else { panic!("{line:?}") };
    let rank: usize = rank.parse().unwrap();
    let rendezvous = Rendezvous {
        socket: socket.into(),
        rank,
        world_size: RANKS,
        fingerprint: "ops".to_owned(),
        timeout: Duration::from_secs(60),
    };
    let communicator: Box<dyn Communicator> = Box::new(join(&rendezvous).unwrap());
    let options = CudaOptions {
        ordinal: device.parse().unwrap(),
        rank_path: RankPath::from_name(path).unwrap(),
        ..CudaOptions::default()
    };
    let mut backend = CudaBackend::new(options, communicator).unwrap();
    // The host's memory would give the same sums.
    assert_eq!(Some(backend.rank_path()), RankPath::from_name(path));
    match task {
        "sums" => sums(&mut backend, rank),
        "gathers" => gathers(&mut backend, rank),
        "replays" => replays(&mut backend, rank),
        "loss" => loss(&mut backend, rank),
        other => panic!("{other}"),
    }
    println!("rank {rank} is done");
    std::process::exit(0);
}

fn values_of(rank: usize, round: usize, len: usize) -> Vec<f32> {
    Random((rank * 1000 + round) as u64).vector(len)
}

/// A buffer with values of `dtype`; the step is one of `rows` tokens.
fn upload(
    backend: &mut CudaBackend,
    values: &[f32],
    width: usize,
    dtype: DType,
) -> <CudaBackend as Backend>::Buffer {
    let rows = values.len() / width;
    let table = backend.linear(&[matrix(values, rows, width, DType::F32)], DType::F32).unwrap();
    let mut buffer = backend.buffer(rows, width, dtype).unwrap();
    backend.begin_step(&prompt(rows)).unwrap();
    backend.embed(&table, 0, &mut buffer).unwrap();
    // The table goes when nothing reads it any more.
    backend.read(&buffer).unwrap();
    buffer
}

fn check_sum(sum: &[f32], parts: &[Vec<f32>], dtype: DType, what: &str) {
    for (index, &found) in sum.iter().enumerate() {
        let exact: f64 = parts.iter().map(|part| f64::from(rounded(part[index], dtype))).sum();
        // Of two ranks the sum in float32 is rounded once, and once more to the type.
        let unit = if dtype == DType::F32 { 1e-7 } else { f64::from(f32::EPSILON) * 65536.0 };
        let bound = exact.abs() * unit + 1e-30;
        assert!((f64::from(found) - exact).abs() <= bound, "{what}: {index}: {found}, expected {exact}");
    }
}

fn sums(backend: &mut CudaBackend, rank: usize) {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for (round, (rows, width)) in SHAPES.into_iter().cycle().take(2 * SHAPES.len()).enumerate() {
            let mut x = upload(backend, &values_of(rank, round, rows * width), width, dtype);
            backend.all_reduce(&mut x).unwrap();
            let sum = backend.read(&x).unwrap();
            let parts: Vec<_> = (0..RANKS).map(|rank| values_of(rank, round, rows * width)).collect();
            check_sum(&sum, &parts, dtype, &format!("{rows} x {width} of {dtype}"));
            let bits: u64 = sum
                .iter()
                .fold(7, |hash, value| hash.wrapping_mul(31).wrapping_add(u64::from(value.to_bits())));
            println!("bits {dtype} {round} {bits}");
        }
    }
}

fn gathers(backend: &mut CudaBackend, rank: usize) {
    let shapes: [(usize, [usize; RANKS]); 6] =
        [(1, [3, 2]), (5, [64, 128]), (33, [64128, 64000]), (7, [1025, 9]), (2, [4, 0]), (128, [4096, 4032])];
    for (round, (rows, widths)) in shapes.into_iter().cycle().take(12).enumerate() {
        if widths[rank] == 0 {
            // A rank without columns brings a buffer all the same.
            let mut local = backend.buffer(rows, 1, DType::F32).unwrap();
            backend.begin_step(&prompt(rows)).unwrap();
            let table = backend.linear(&[matrix(&vec![0.0; rows], rows, 1, DType::F32)], DType::F32).unwrap();
            backend.embed(&table, 0, &mut local).unwrap();
            gather(backend, &local, (rows, &widths), round);
        } else {
            let local =
                upload(backend, &values_of(rank, round, rows * widths[rank]), widths[rank], DType::F32);
            gather(backend, &local, (rows, &widths), round);
        }
    }
}

fn gather(
    backend: &mut CudaBackend,
    local: &<CudaBackend as Backend>::Buffer,
    (rows, widths): (usize, &[usize; RANKS]),
    round: usize,
) {
    let row_width: usize = widths.iter().sum();
    let mut out = backend.buffer(rows, row_width, DType::F32).unwrap();
    backend.all_gather(local, widths, &mut out).unwrap();
    let found = backend.read(&out).unwrap();
    let parts: Vec<_> = (0..RANKS).map(|rank| values_of(rank, round, rows * widths[rank])).collect();
    for row in 0..rows {
        let expected: Vec<f32> =
            (0..RANKS).flat_map(|rank| parts[rank][row * widths[rank]..][..widths[rank]].to_vec()).collect();
        assert!(found[row * row_width..][..row_width] == expected, "row {row} of {rows} x {widths:?}");
    }
}

/// A thousand replays of a recording of sums of both kinds, with other values every time.
fn replays(backend: &mut CudaBackend, rank: usize) {
    const WIDTH: usize = 8192;
    const ROWS: usize = 64;
    let tables: Vec<Vec<f32>> = (0..RANKS).map(|rank| values_of(rank, 0, ROWS * WIDTH)).collect();
    let table = backend.linear(&[matrix(&tables[rank], ROWS, WIDTH, DType::F32)], DType::F32).unwrap();
    let mut x = backend.buffer(ROWS, WIDTH, DType::BF16).unwrap();
    for replay in 0..1000 {
        let rows = if replay % 2 == 0 { ROWS } else { 1 };
        let ids: Vec<u32> = (0..rows).map(|row| ((row + replay) % ROWS) as u32).collect();
        backend.begin_step(&decode(&ids)).unwrap();
        backend.embed(&table, 0, &mut x).unwrap();
        backend
            .run(StepPart::Layers, |backend| {
                backend.all_reduce(&mut x)?;
                backend.all_reduce(&mut x)?;
                Ok::<_, BackendError>(())
            })
            .unwrap();
        if replay % 20 < 2 {
            let found = backend.read(&x).unwrap();
            for (row, &id) in ids.iter().enumerate().step_by(7) {
                for column in 0..WIDTH {
                    let at = id as usize * WIDTH + column;
                    let once: f32 = tables.iter().map(|table| rounded(table[at], DType::BF16)).sum();
                    let expected = 2.0 * rounded(once, DType::BF16);
                    assert!(
                        found[row * WIDTH + column] == expected,
                        "replay {replay}, row {row}, column {column}"
                    );
                }
            }
        } else {
            backend.read(&x).unwrap();
        }
    }
}

fn decode(ids: &[u32]) -> StepInput {
    let count = ids.len() as u32;
    StepInput {
        input_ids: ids.to_vec(),
        position_ids: vec![0; ids.len()],
        slot_mapping: (1..=count).map(|seq| seq * 16).collect(),
        cu_seqlens_q: (0..=count).collect(),
        context_lens: vec![1; ids.len()],
        prompt_lens: vec![0; ids.len()],
        block_tables: (1..=count).collect(),
        max_blocks: 1,
        logits_rows: (0..count).collect(),
    }
}

/// Rank 1 goes away; rank 0 sees it within the bound.
fn loss(backend: &mut CudaBackend, rank: usize) {
    let mut x = upload(backend, &values_of(rank, 0, 4096), 4096, DType::F32);
    backend.all_reduce(&mut x).unwrap();
    backend.read(&x).unwrap();
    if rank == 1 {
        std::process::exit(0);
    }
    let begin = Instant::now();
    let error = backend.all_reduce(&mut x).and_then(|()| backend.read(&x)).unwrap_err();
    println!("after {:?}: {error}", begin.elapsed());
    assert!(matches!(error, BackendError::DeviceLost { .. }), "{error}");
    assert!(error.to_string().contains("rank 1"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(45));
}

/// Number of devices, as far as it matters.
fn num_devices() -> usize {
    (0..2).take_while(|&ordinal| CudaBackend::find_device(ordinal).is_ok()).count()
}

/// Runs `task` in two processes on `devices` and answers what they print.
fn run(task: &str, path: &str, devices: [usize; RANKS]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("rendezvous");
    let children: Vec<Child> = (0..RANKS)
        .map(|rank| {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "ranks::rank_process", "--ignored", "--nocapture"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let line = format!("{rank} {} {path} {task} {}\n", devices[rank], socket.display());
            child.stdin.take().unwrap().write_all(line.as_bytes()).unwrap();
            child
        })
        .collect();
    let outputs: Vec<_> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    outputs
        .into_iter()
        .map(|output| {
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(output.status.success(), "{task} by {path} on {devices:?}: {text}");
            text
        })
        .collect()
}

/// Every way that this machine has for `task`.
fn run_everywhere(task: &str) -> Vec<Vec<String>> {
    let count = num_devices();
    if count == 0 {
        eprintln!("not tested: there is no GPU");
        return Vec::new();
    }
    let mut outputs = vec![run(task, "peers", [0, 0])];
    if count == 1 {
        eprintln!("not tested on two GPUs, nor through NCCL: there is one");
        return outputs;
    }
    outputs.push(run(task, "peers", [0, 1]));
    outputs.push(run(task, "nccl", [0, 1]));
    outputs
}

#[test]
fn sums_are_right_and_of_equal_bits() {
    for ranks in run_everywhere("sums") {
        let bits = |text: &String| {
            text.lines().filter(|line| line.starts_with("bits")).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(bits(&ranks[0]).len(), 6 * SHAPES.len());
        assert_eq!(bits(&ranks[0]), bits(&ranks[1]));
    }
}

#[test]
fn columns_of_any_width_are_gathered() {
    run_everywhere("gathers");
}

#[test]
fn recordings_are_replayed_with_other_values() {
    run_everywhere("replays");
}

#[test]
#[ignore = "waits half a minute for a rank that is gone"]
fn a_rank_that_is_gone_ends_the_wait() {
    match num_devices() {
        0 => eprintln!("not tested: there is no GPU"),
        count => {
            let outputs = run("loss", "peers", [0, count - 1]);
            eprintln!("{}", outputs[0]);
        }
    }
}
