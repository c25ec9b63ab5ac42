//! Embedding, gathering rows, and the collectives of one rank.

use backend::{Backend, DType};

use crate::cases::{Random, matrix, on_every_backend, prompt, rounded, upload};

fn embeds<B: Backend>(backend: &mut B) {
    let mut random = Random(6);
    let (rows, width, first_id) = (37, 51, 100);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let values = random.vector(rows * width);
        let table = backend.linear(&[matrix(&values, rows, width, DType::F32)], dtype).unwrap();
        let mut step = prompt(4);
        step.input_ids = vec![100, 136, 99, 137];
        backend.begin_step(&step).unwrap();
        let mut out = backend.buffer(4, width, DType::F32).unwrap();
        backend.embed(&table, first_id, &mut out).unwrap();
        let mut expected: Vec<f32> = values[..width].iter().map(|&x| rounded(x, dtype)).collect();
        expected.extend(values[36 * width..].iter().map(|&x| rounded(x, dtype)));
        expected.extend(vec![0.0; 2 * width]);
        assert_eq!(backend.read(&out).unwrap(), expected, "{dtype}");
    }
}

#[test]
fn embed_gives_rows_of_its_part_and_zeros() {
    on_every_backend!(embeds);
}

fn adds_positions<B: Backend>(backend: &mut B) {
    let mut random = Random(35);
    let (rows, width, offset) = (12, 51, 2);
    let (values, x) = (random.vector(rows * width), random.vector(4 * width));
    let table = backend.linear(&[matrix(&values, rows, width, DType::F32)], DType::F32).unwrap();
    let mut out = upload(backend, &x, width);
    let mut step = prompt(4);
    step.position_ids = vec![0, 9, 9, 3];
    backend.begin_step(&step).unwrap();
    backend.add_positions(&table, offset, &mut out).unwrap();
    let expected: Vec<f32> = x
        .chunks(width)
        .zip([2, 11, 11, 5])
        .flat_map(|(x, row)| x.iter().zip(&values[row * width..]).map(|(x, value)| x + value))
        .collect();
    assert_eq!(backend.read(&out).unwrap(), expected);
    step.position_ids[1] = 10;
    backend.begin_step(&step).unwrap();
    let error = backend.add_positions(&table, offset, &mut out).unwrap_err().to_string();
    assert!(error.contains("row 12 of a table of 12"), "{error}");
}

#[test]
fn learned_positions_are_added_and_bounded() {
    on_every_backend!(adds_positions);
}

fn gathers<B: Backend>(backend: &mut B) {
    let x: Vec<f32> = (0..15u8).map(f32::from).collect();
    let input = upload(backend, &x, 3);
    let mut out = backend.buffer(4, 3, DType::F32).unwrap();
    backend.gather_rows(&input, &[4, 0, 4], &mut out).unwrap();
    assert_eq!(backend.read(&out).unwrap(), [12.0, 13.0, 14.0, 0.0, 1.0, 2.0, 12.0, 13.0, 14.0]);
    backend.all_reduce(&mut out).unwrap();
    let mut gathered = backend.buffer(4, 3, DType::F32).unwrap();
    backend.all_gather(&out, &[3], &mut gathered).unwrap();
    assert_eq!(backend.read(&gathered).unwrap(), backend.read(&out).unwrap());
}

#[test]
fn gather_rows_copies_and_one_rank_is_its_own_sum() {
    on_every_backend!(gathers);
}

fn reports_memory<B: Backend>(backend: &mut B) {
    let memory = backend.memory().unwrap();
    assert!(memory.available_bytes > 0 && memory.available_bytes <= memory.total_bytes);
    assert_eq!(backend.rank_and_world(), (0, 1));
    assert!(!backend.device().description.is_empty());
}

#[test]
fn device_says_what_it_is() {
    on_every_backend!(reports_memory);
}
