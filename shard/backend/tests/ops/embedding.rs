//! Embedding, gathering rows, and the collectives of one rank.

use backend::{Backend, DType};

use crate::cases::{
    Random, activation_types, matrix, on_every_backend, prompt, random_as, rounded, upload, upload_as,
};

fn embeds<B: Backend>(backend: &mut B) {
    let mut random = Random(6);
    let (rows, first_id) = (37, 100);
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    let pairs: Vec<_> =
        activation_types(backend).iter().flat_map(|&out| dtypes.map(|dtype| (dtype, out))).collect();
    for ((dtype, out_dtype), width) in pairs.into_iter().flat_map(|pair| [(pair, 51), (pair, 264)]) {
        let values = random.vector(rows * width);
        let table = backend.linear(&[matrix(&values, rows, width, DType::F32)], dtype).unwrap();
        let mut step = prompt(4);
        step.input_ids = vec![100, 136, 99, 137];
        backend.begin_step(&step).unwrap();
        let mut out = backend.buffer(4, width, out_dtype).unwrap();
        backend.embed(&table, first_id, &mut out).unwrap();
        let stored = |x: &f32| rounded(rounded(*x, dtype), out_dtype);
        let mut expected: Vec<f32> = values[..width].iter().map(stored).collect();
        expected.extend(values[36 * width..].iter().map(stored));
        expected.extend(vec![0.0; 2 * width]);
        assert_eq!(backend.read(&out).unwrap(), expected, "{dtype} into {out_dtype}");
    }
}

#[test]
fn embed_gives_rows_of_its_part_and_zeros() {
    on_every_backend!(embeds);
}

fn adds_positions<B: Backend>(backend: &mut B) {
    let mut random = Random(35);
    let (rows, offset) = (12, 2);
    for width in [51, 264] {
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
}

#[test]
fn learned_positions_are_added_and_bounded() {
    on_every_backend!(adds_positions);
}

fn gathers<B: Backend>(backend: &mut B) {
    let mut random = Random(36);
    for &dtype in activation_types(backend) {
        for width in [3, 17, 64] {
            let x = random_as(&mut random, 5 * width, dtype);
            let input = upload_as(backend, &x, width, dtype);
            let mut out = backend.buffer(6, width, dtype).unwrap();
            for rows in [vec![4, 0, 4], vec![0, 1, 2, 3, 4], vec![3]] {
                backend.gather_rows(&input, &rows, &mut out).unwrap();
                let row = |&row: &u32| &x[row as usize * width..(row as usize + 1) * width];
                let expected: Vec<f32> = rows.iter().flat_map(row).copied().collect();
                assert_eq!(backend.read(&out).unwrap(), expected, "rows {rows:?} of {width}");
            }
        }
    }
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
