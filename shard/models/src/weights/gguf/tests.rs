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
    let key = |name: &str| format!("{architecture}.{name}");
    let (heads, kv_heads, width) =
        (key("attention.head_count"), key("attention.head_count_kv"), key("embedding_length"));
    let numbers = [(heads.as_str(), 4), (kv_heads.as_str(), 2), (width.as_str(), 8)];
    std::fs::write(&path, gguf_bytes(architecture, &numbers, &[], tensors)).unwrap();
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

/// Numbers from 0 on, as f32.
fn counted(name: &str, shape: &[usize]) -> GgufTensor {
    let data = (0..shape.iter().product()).flat_map(|index: usize| (index as f32).to_le_bytes()).collect();
    (name.to_owned(), shape.to_vec(), F32, data)
}

/// The first number of each row of a window.
fn first_of_rows(weights: &GgufWeights, name: &str, rows: Range<usize>, width: usize) -> Vec<f32> {
    values(&weights.matrix(name, rows, 0..width).unwrap()).iter().map(|row| row[0]).collect()
}

#[test]
fn queries_keys_and_values_of_all_heads_go_back_to_their_heads() {
    // Heads of two elements; the file has eight rows of queries, then keys, then values.
    let qkv = [counted("blk.0.attn_qkv.weight", &[24, 1]), counted("blk.0.attn_qkv.bias", &[24])];
    let name = "transformer.h.0.self_attention.query_key_value";
    let bloom = open_as("bloom", &qkv, 1).unwrap();
    let expected = [0., 1., 8., 9., 16., 17., 2., 3., 10., 11.];
    assert_eq!(first_of_rows(&bloom, &format!("{name}.weight"), 0..10, 1), expected);
    assert_eq!(bloom.vector(&format!("{name}.bias"), 0..10).unwrap(), expected);
    // Two KV heads, each with two query heads.
    let falcon = open_as("falcon", &[counted("blk.0.attn_qkv.weight", &[16, 1])], 1).unwrap();
    let expected = [0., 1., 2., 3., 8., 9., 12., 13., 4., 5., 6., 7., 10., 11., 14., 15.];
    assert_eq!(first_of_rows(&falcon, &format!("{name}.weight"), 0..16, 1), expected);
    let error =
        open_as("falcon", &[counted("blk.0.attn_qkv.weight", &[15, 1])], 1).err().unwrap().to_string();
    assert!(error.contains("has 15 rows, which 4 heads of a width of 8"), "{error}");
    // Phi-2's first files: one tensor for three.
    let phi = open_as("phi2", &qkv, 1).unwrap();
    assert_eq!(first_of_rows(&phi, "model.layers.0.self_attn.k_proj.weight", 0..2, 1), [8., 9.]);
    assert_eq!(phi.vector("model.layers.0.self_attn.v_proj.bias", 6..8).unwrap(), [22., 23.]);
}

#[test]
fn experts_are_matrices_of_their_own() {
    let tensors = [
        counted("blk.1.ffn_up_exps.weight", &[3, 2, 4]),
        counted("blk.1.ffn_gate_inp_shexp.weight", &[4]),
        random("blk.1.ffn_down_exps.weight", [3 * 5, 32], Q8_0, (32, 34)),
    ];
    let mut tensors = tensors.to_vec();
    tensors[2].1 = vec![3, 5, 32];
    let weights = open_as("qwen2moe", &tensors, 1).unwrap();
    let name = "model.layers.1.mlp.experts.2.up_proj.weight";
    assert_eq!(weights.meta(name).unwrap().shape, [2, 4]);
    assert_eq!(first_of_rows(&weights, name, 0..2, 4), [16., 20.]);
    assert_eq!(weights.meta("model.layers.1.mlp.shared_expert_gate.weight").unwrap().shape, [1, 4]);
    let whole = open(&[("output.weight".to_owned(), vec![15, 32], Q8_0, tensors[2].3.clone())], 1).unwrap();
    let expected = values(&whole.matrix("lm_head.weight", 5..10, 0..32).unwrap());
    let name = "model.layers.1.mlp.experts.1.down_proj.weight";
    assert_eq!(values(&weights.matrix(name, 0..5, 0..32).unwrap()), expected);
}

#[test]
fn transposes_are_undone_plain_and_quantized() {
    let (rows, cols) = (5, 64);
    let file = |experts: usize| random("blk.0.ffn_down_exps.weight", [experts * rows, cols], Q8_0, (32, 34));
    let (mut stacked, mut single) = (file(3), file(1));
    stacked.1 = vec![3, rows, cols];
    single.0 = "blk.0.ffn_down.weight".to_owned();
    for (architecture, tensor, name, count) in [
        ("gpt2", single, "transformer.h.0.mlp.c_proj.weight", 1),
        ("dbrx", stacked, "transformer.blocks.0.ffn.experts.mlp.w2", 3),
    ] {
        let plain =
            open(&[("output.weight".to_owned(), vec![count * rows, cols], Q8_0, tensor.3.clone())], 1);
        let in_file = values(&plain.unwrap().matrix("lm_head.weight", 0..count * rows, 0..cols).unwrap());
        let weights = open_as(architecture, &[tensor], 1).unwrap();
        let meta = weights.meta(name).unwrap();
        assert_eq!(meta.shape, [count * cols, rows]);
        assert!(meta.quantized.unwrap().is_transposed);
        for expert in 0..count {
            let first = expert * cols;
            let window = values(&weights.matrix(name, first + 7..first + 60, 1..4).unwrap());
            for (row, found) in window.iter().enumerate() {
                let expected: Vec<_> = (1..4).map(|col| in_file[expert * rows + col][7 + row]).collect();
                assert_eq!(*found, expected, "{name} {expert} {row}");
            }
            let quantized = weights.quantized(name, 1..4, first + 32..first + 64).unwrap().unwrap();
            for row in 0..3 {
                let mut found = vec![0.0; 32];
                quantized.read_row(row, &mut found);
                let rounded: Vec<_> = found.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
                assert_eq!(rounded, in_file[expert * rows + 1 + row][32..], "{name} {expert} {row}");
            }
        }
        assert!(weights.matrix(name, 0..count * cols + 1, 0..1).is_err());
        assert!(count == 1 || weights.matrix(name, 32..96, 0..1).is_err(), "of two experts");
        assert!(count == 1 || weights.quantized(name, 0..1, 32..96).unwrap().is_err(), "of two experts");
    }
}

#[test]
fn keys_and_values_of_latent_vectors_are_one_projection_again() {
    // Two heads, keys of three elements, values of two, latent vectors of four; keys are stored transposed.
    let parts = [counted("blk.0.attn_k_b.weight", &[2, 4, 3]), counted("blk.0.attn_v_b.weight", &[2, 2, 4])];
    let weights = open_as("deepseek2", &parts, 1).unwrap();
    let name = "model.layers.0.self_attn.kv_b_proj.weight";
    assert_eq!(weights.names(), [name]);
    assert_eq!(weights.meta(name).unwrap().shape, [10, 4]);
    let all = values(&weights.matrix(name, 0..10, 0..4).unwrap());
    assert_eq!(all[0], [0., 3., 6., 9.]);
    assert_eq!(all[3], [0., 1., 2., 3.], "the first row of values");
    assert_eq!(all[7], [14., 17., 20., 23.], "the last key of the second head");
    assert_eq!(all[9], [12., 13., 14., 15.]);
    for (rows, cols) in [(2..9, 1..3), (4..5, 0..4), (5..5, 0..4)] {
        let expected: Vec<_> = all[rows.clone()].iter().map(|row| row[cols.clone()].to_vec()).collect();
        assert_eq!(values(&weights.matrix(name, rows, cols).unwrap()), expected);
    }
    assert!(weights.matrix(name, 0..11, 0..4).is_err());
    // Parts that do not fit one another are left as they are, to be listed as surplus.
    let odd = [counted("blk.0.attn_k_b.weight", &[2, 4, 3]), counted("blk.0.attn_v_b.weight", &[2, 2, 5])];
    assert_eq!(open_as("deepseek2", &odd, 1).unwrap().names().len(), 2);
}
