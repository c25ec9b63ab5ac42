//! Windows, threads and reordered rows of tensors in a file made here.

use hub::{HubOptions, ModelRef};

use super::*;
use crate::testing::{GgufTensor, Noise, gguf_bytes};

const F32: u32 = 0;
const Q4_1: u32 = 3;
const Q8_0: u32 = 8;
const Q4_K: u32 = 12;
const IQ4_XS: u32 = 23;

fn open(tensors: &[GgufTensor], threads: usize) -> Result<GgufWeights, ModelError> {
    open_as("llama", tensors, threads)
}

fn open_as(architecture: &str, tensors: &[GgufTensor], threads: usize) -> Result<GgufWeights, ModelError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let heads = [("llama.attention.head_count", 4), ("llama.attention.head_count_kv", 2)];
    std::fs::write(&path, gguf_bytes(architecture, &heads, &[], tensors)).unwrap();
    let model = ModelRef { model_id: path.display().to_string(), revision: None };
    let files = hub::locate(&model, &HubOptions::default()).unwrap();
    // The map outlives the file's name.
    GgufWeights::new(files.gguf().unwrap().unwrap(), &path, threads)
}

fn random(name: &str, shape: [usize; 2], code: u32, block: (usize, usize)) -> GgufTensor {
    let mut noise = Noise::new(shape[0] as u64);
    let bytes = shape[0] * shape[1] / block.0 * block.1;
    let mut data: Vec<u8> = (0..bytes).map(|_| noise.next() as u8).collect();
    // Scales and offsets near 1, so that every number is one.
    for block in data.chunks_exact_mut(block.1) {
        block[1] = 0x3c;
        block[3] = 0x3c;
    }
    (name.to_owned(), shape.to_vec(), code, data)
}

fn values(matrix: &HostMatrix<'_>) -> Vec<Vec<f32>> {
    let row = |index| {
        let mut row = vec![0.0; matrix.cols];
        matrix.read_row(index, &mut row);
        row
    };
    (0..matrix.rows).map(row).collect()
}

#[test]
fn any_window_on_any_number_of_threads_equals_the_whole() {
    let name = "model.layers.0.mlp.down_proj.weight";
    let tensor = random("blk.0.ffn_down.weight", [500, 320], Q4_1, (32, 20));
    let whole =
        values(&open(std::slice::from_ref(&tensor), 1).unwrap().matrix(name, 0..500, 0..320).unwrap());
    let threaded = open(&[tensor], 3).unwrap();
    let mut noise = Noise::new(7);
    for round in 0..60 {
        let (row, col) = (noise.below(500), noise.below(320));
        let rows = if round == 0 { 0..500 } else { row..row + noise.below(501 - row) };
        let cols = if round < 20 { 0..320 } else { col..col + noise.below(321 - col) };
        let window = threaded.matrix(name, rows.clone(), cols.clone()).unwrap();
        let expected: Vec<_> = whole[rows].iter().map(|row| row[cols.clone()].to_vec()).collect();
        assert!(values(&window) == expected);
    }
    assert!(threaded.matrix(name, 0..501, 0..320).is_err());
    assert!(threaded.matrix(name, 0..1, 300..321).is_err());
    assert!(threaded.matrix("x", 0..1, 0..1).is_err());
}

#[test]
fn rows_of_queries_and_keys_are_put_in_order() {
    // Row r holds the number r. Four query heads of six rows, two KV heads of twelve.
    let rows = |code: u32| match code {
        F32 => (0..24).flat_map(|row| [row as f32; 32]).flat_map(f32::to_le_bytes).collect(),
        _ => (0..24).flat_map(|row| [vec![0, 0x3c], vec![row; 32]].concat()).collect::<Vec<u8>>(),
    };
    for code in [F32, Q8_0] {
        let weights = open(
            &[
                ("blk.0.attn_q.weight".to_owned(), vec![24, 32], code, rows(code)),
                ("blk.0.attn_k.weight".to_owned(), vec![24, 32], code, rows(code)),
                ("blk.0.attn_v.weight".to_owned(), vec![24, 32], code, rows(code)),
            ],
            2,
        )
        .unwrap();
        let order = |projection: &str, rows: Range<usize>| -> Vec<f32> {
            let name = format!("model.layers.0.self_attn.{projection}_proj.weight");
            values(&weights.matrix(&name, rows, 3..5).unwrap()).iter().map(|row| row[1]).collect()
        };
        assert_eq!(order("q", 0..12), [0., 2., 4., 1., 3., 5., 6., 8., 10., 7., 9., 11.]);
        assert_eq!(order("q", 7..9), [8., 10.]);
        assert_eq!(order("k", 12..24), [12., 14., 16., 18., 20., 22., 13., 15., 17., 19., 21., 23.]);
        assert_eq!(order("v", 0..3), [0., 1., 2.]);
    }
}

#[test]
fn biases_are_put_in_order_too() {
    let data = (0..8).flat_map(|index| (index as f32).to_le_bytes()).collect();
    let weights = open(&[("blk.1.attn_k.bias".to_owned(), vec![8], F32, data)], 1).unwrap();
    let bias = weights.vector("model.layers.1.self_attn.k_proj.bias", 0..8).unwrap();
    assert_eq!(bias, [0., 2., 1., 3., 4., 6., 5., 7.]);
}

#[test]
fn quantized_windows_equal_the_dequantized_ones() {
    let name = "model.layers.0.mlp.down_proj.weight";
    let tensor = random("blk.0.ffn_down.weight", [300, 512], Q4_K, (256, 144));
    let plain = open(std::slice::from_ref(&tensor), 1).unwrap();
    let threaded = open(&[tensor], 3).unwrap();
    assert_eq!(
        threaded.meta(name).unwrap().quantized,
        Some(QuantizedMeta { bits: 4, group_size: 32, is_transposed: false })
    );
    for (rows, cols) in [(0..300, 0..512), (17..18, 0..512), (100..299, 96..416), (5..5, 0..32)] {
        let quantized = threaded.quantized(name, rows.clone(), cols.clone()).unwrap().unwrap();
        let expected = values(&plain.matrix(name, rows, cols).unwrap());
        for (row, expected) in expected.iter().enumerate() {
            let mut found = vec![0.0; quantized.cols];
            quantized.read_row(row, &mut found);
            let rounded: Vec<_> = found.iter().map(|&value| half::bf16::from_f32(value).to_f32()).collect();
            assert_eq!(&rounded, expected);
        }
        threaded.recycle_quantized(quantized);
    }
    assert!(threaded.quantized(name, 0..3, 0..48).is_none(), "the columns cut a group");
    assert!(threaded.quantized(name, 0..301, 0..512).unwrap().is_err());
    assert!(threaded.quantized("x", 0..1, 0..32).is_none());
}

#[test]
fn gemma_norms_are_differences_from_one_again() {
    let data = [1.5_f32, 0.25].iter().flat_map(|value| value.to_le_bytes()).collect();
    let norm = ("blk.0.attn_q_norm.weight".to_owned(), vec![2], F32, data);
    let weights = open_as("gemma3", &[norm], 1).unwrap();
    let found = weights.vector("model.layers.0.self_attn.q_norm.weight", 0..2).unwrap();
    assert_eq!(found, [0.5, -0.75]);
}

#[test]
fn formats_and_heads_that_do_not_fit_are_named() {
    let tensor = ("output.weight".to_owned(), vec![2, 256], IQ4_XS, vec![0; 2 * 136]);
    let weights = open(&[tensor], 1).unwrap();
    assert_eq!(weights.meta("lm_head.weight").unwrap().dtype, None);
    let error = weights.matrix("lm_head.weight", 0..2, 0..256).unwrap_err().to_string();
    assert!(
        error.starts_with("tensor lm_head.weight of shape [2, 256] is stored as IQ4_XS, expected F32"),
        "{error}"
    );

    let odd = ("blk.0.attn_q.weight".to_owned(), vec![6, 1], F32, vec![0; 24]);
    let error = open(&[odd], 1).err().unwrap().to_string();
    assert!(
        error.ends_with("tensor blk.0.attn_q.weight has 6 rows, which 4 heads cannot share in pairs"),
        "{error}"
    );
}
