//! Rotary scalings: numbers worked out from their formulas, spellings, and refusals.

use backend::RopeFrequencies;
use hub::{RopeKind, RopeOverride};
use serde_json::{Value, json};

use super::config_reader::ConfigReader;
use super::tests::{config, refusal, spec};
use super::{rope, spec_with};
use crate::spec::MixerSpec;

/// The frequencies of the last layer: heads of 16 elements in a model of 512 positions, base 10000.
fn frequencies(changes: Value) -> RopeFrequencies {
    let spec = spec(changes);
    #[allow(irrefutable_let_patterns, reason = "other mixers have rotary embeddings of their own kind")]
    let MixerSpec::Attention(attention) = &spec.layers[1].mixer else {
        panic!("the test's llama has attention")
    };
    attention.rope.clone().unwrap()
}

fn assert_close(found: &[f32], expected: impl IntoIterator<Item = f64>) {
    let expected: Vec<f64> = expected.into_iter().collect();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((f64::from(*found) / expected - 1.0).abs() < 1e-6, "{found} is not {expected}");
    }
}

fn longrope() -> Value {
    json!({
        "type": "longrope",
        "short_factor": [1.0, 1.5, 2, 2.5, 3, 3.5, 4, 4.5],
        "long_factor": [1.0, 2, 3, 4, 5, 6, 7, 8],
    })
}

#[test]
fn longrope_divides_each_pair_by_its_own_factor() {
    let rope = frequencies(json!({"rope_scaling": longrope(), "original_max_position_embeddings": 64}));
    let plain = |pair: u8| 10_000_f64.powf(-f64::from(pair) / 8.0);
    // 512 / 64 = 2^3 and 64 = 2^6: the root of 1 + 3 / 6.
    let scale = 1.5_f64.sqrt() as f32;
    for prompt_len in [1, 64] {
        let (found, found_scale) = rope.for_prompt(prompt_len);
        assert_close(&found, (0..8).map(|pair| plain(pair) / (1.0 + 0.5 * f64::from(pair))));
        assert_eq!(found_scale, scale);
    }
    for prompt_len in [65, 500] {
        let (found, found_scale) = rope.for_prompt(prompt_len);
        assert_close(&found, (0..8).map(|pair| plain(pair) / (1.0 + f64::from(pair))));
        assert_eq!(found_scale, scale);
    }
}

#[test]
fn spellings_of_longrope() {
    let beside = |scaling: Value, original: u32| {
        frequencies(json!({"rope_scaling": scaling, "original_max_position_embeddings": original}))
    };
    let expected = beside(longrope(), 64);
    for name in ["su", "yarn"] {
        let mut old = longrope();
        old["type"] = json!(name);
        assert_eq!(beside(old, 64), expected, "{name}");
    }
    let mut inside = longrope();
    inside["original_max_position_embeddings"] = json!(64);
    assert_eq!(frequencies(json!({"rope_scaling": inside})), expected);
    let mut newer = inside.clone();
    newer["rope_theta"] = json!(10_000.0);
    newer["partial_rotary_factor"] = json!(1.0);
    assert_eq!(frequencies(json!({"rope_parameters": newer})), expected);

    let mut with_factor = inside.clone();
    with_factor["factor"] = json!(64.0);
    let scale = frequencies(json!({"rope_scaling": with_factor})).scale;
    assert_eq!(scale, 2_f32.sqrt(), "a factor wins over the ratio");
    assert_eq!(beside(with_factor, 64), expected, "but not over a context beside the scaling");

    let mut told = inside.clone();
    told["attention_factor"] = json!(1.25);
    assert_eq!(frequencies(json!({"rope_scaling": told})).for_prompt(65).1, 1.25);
    // Phi-3.5-MoE has one for each range.
    (told["short_mscale"], told["long_mscale"]) = (json!(1.125), json!(1.375));
    let rope = frequencies(json!({"rope_scaling": told}));
    assert_eq!((rope.for_prompt(64).1, rope.for_prompt(65).1), (1.125, 1.375));
    let unscaled = beside(longrope(), 512);
    assert_eq!((unscaled.scale, unscaled.for_prompt(512).1), (1.0, 1.0));
}

#[test]
fn mistakes_in_longrope_are_told_at_once() {
    let mut wrong = longrope();
    wrong["short_factor"] = json!([1.0, 2.0]);
    wrong["long_factor"] = json!([1, 1, 1, 1, 1, 1, 1, -1]);
    let error = refusal(json!({"rope_scaling": wrong}));
    assert_eq!(
        error.lines().collect::<Vec<_>>(),
        [
            "config.json: rope_scaling: original_max_position_embeddings is missing, expected a positive number",
            "config.json: rope_scaling: short_factor has 2 numbers, expected 8, one for every two elements of a head \
             that turn",
            "config.json: rope_scaling: long_factor has -1, expected positive numbers",
        ]
    );
    for (key, value, expected) in [
        ("long_factor", json!("long"), "long_factor is no list, expected a list of positive numbers"),
        (
            "long_factor",
            json!([1, 1, 1, null, 1, 1, 1, 1]),
            "long_factor has null, expected positive numbers",
        ),
        ("short_factor", json!([1e-320, 1, 1, 1, 1, 1, 1, 1]), "frequencies are not finite"),
        ("long_factor", json!([1e-320, 1, 1, 1, 1, 1, 1, 1]), "frequencies are not finite"),
        ("original_max_position_embeddings", json!(1), "found 1, expected more than 1 with longrope"),
    ] {
        let mut scaling = longrope();
        scaling["original_max_position_embeddings"] = json!(64);
        scaling[key] = value;
        let error = refusal(json!({"rope_scaling": scaling}));
        assert!(error.contains(expected) && error.lines().count() == 1, "{error}");
    }
}

#[test]
fn dynamic_ntk_grows_the_base_with_the_prompt() {
    let rope = frequencies(json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}}));
    let powers = |base: f64| (0..8).map(move |pair| base.powf(-f64::from(pair) / 8.0));
    assert_close(&rope.for_prompt(7).0, powers(10_000.0));
    assert_close(&rope.for_prompt(512).0, powers(10_000.0));
    for (prompt_len, stretch) in [(513, 4.0 * 513.0 / 512.0 - 3.0), (1024, 5.0), (2048, 13.0)] {
        let base = 10_000.0 * f64::powf(stretch, 16.0 / 14.0);
        assert_close(&rope.for_prompt(prompt_len).0, powers(base));
        assert_eq!(rope.for_prompt(prompt_len).1, 1.0);
    }
    let newer = json!({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0});
    assert_eq!(frequencies(json!({"rope_parameters": newer})), rope);
}

#[test]
fn yarn_takes_the_factor_it_is_told() {
    let yarn = |factor: Value| {
        let scaling = json!({"type": "yarn", "factor": factor, "original_max_position_embeddings": 128});
        frequencies(json!({"rope_scaling": scaling}))
    };
    assert_eq!(yarn(json!(8.0)).inv_freq[7], frequencies(json!({})).inv_freq[7] / 8.0, "not 512 / 128");
    assert_eq!(yarn(json!(null)), yarn(json!(4.0)), "the ratio where there is none");
    let error = refusal(json!({"rope_scaling": {"type": "yarn"}}));
    assert_eq!(error, "config.json: rope_scaling: factor is missing, expected a positive number");
}

#[test]
fn yarn_with_a_weight_for_all_dimensions_sharpens_the_scores() {
    let factor = |scaling: Value| {
        let config = config(json!({"rope_scaling": scaling}));
        rope::softmax_factor(&mut ConfigReader::new(&config))
    };
    let yarn = json!({"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5});
    let expected = (0.05 * 40_f64.ln() + 1.0).powi(2) as f32;
    assert!((factor(yarn) - expected).abs() < 1e-6);
    assert_eq!(factor(json!({"type": "yarn", "factor": 40.0, "mscale_all_dim": 0})), 1.0);
    assert_eq!(factor(json!({"type": "yarn", "factor": 0.5, "mscale_all_dim": 1.0})), 1.0);
    assert_eq!(factor(json!(null)), 1.0);
}

#[test]
fn scalings_that_are_not_run_are_refused_in_one_line() {
    for (scaling, expected) in [
        (json!({"type": "mrope", "mrope_section": [2, 3, 3]}), "found mrope, which numbers images and video"),
        (json!({"rope_type": "default", "mrope_section": [2, 3, 3]}), "found mrope"),
        (
            json!({"type": "ntk"}),
            "found type \"ntk\", expected default, linear, dynamic, llama3, yarn or longrope",
        ),
        (json!({}), "found no type, expected default"),
        (json!({"type": "dynamic"}), "factor is missing, expected a positive number"),
        (json!(2), "found 2, expected an object or null"),
    ] {
        let error = refusal(json!({"rope_scaling": scaling}));
        let begin = "config.json: rope_scaling: ";
        assert!(
            error.starts_with(begin) && error.contains(expected) && error.lines().count() == 1,
            "{error}"
        );
    }
    let error =
        refusal(json!({"rope_scaling": {"type": "dynamic", "factor": 2}, "max_position_embeddings": null}));
    assert!(error.contains("max_position_embeddings: missing") && error.lines().count() == 1, "{error}");
}

#[test]
fn options_replace_the_scaling_of_the_configuration() {
    let rope = RopeOverride { kind: RopeKind::Dynamic, factor: 4.0 };
    let written = spec(json!({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}));
    assert_eq!(written.max_position_embeddings, 2048);
    for replaced in [json!(null), json!({"type": "mrope"}), longrope()] {
        let config = config(json!({"rope_scaling": replaced}));
        assert!(spec_with(&config, Some(&rope)).unwrap() == written);
    }
    let plain = config(json!({}));
    assert!(spec_with(&plain, None).unwrap() == spec(json!({})));
    let linear = RopeOverride { kind: RopeKind::Linear, factor: 1.0 };
    assert!(spec_with(&plain, Some(&linear)).unwrap() == spec(json!({})));
}

#[test]
fn positions_in_a_table_cannot_be_scaled() {
    let gpt2 = json!({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2,
        "n_positions": 512, "rope_scaling": {"type": "dynamic", "factor": 4.0},
    });
    assert_eq!(spec(gpt2.clone()).max_position_embeddings, 512);
    let rope = RopeOverride { kind: RopeKind::Linear, factor: 2.0 };
    let error = spec_with(&config(gpt2), Some(&rope)).unwrap_err().to_string();
    assert!(
        error.starts_with("--rope-scaling (ROPE_SCALING) linear and --rope-factor (ROPE_FACTOR) 2: "),
        "{error}"
    );
    assert_eq!(error.lines().count(), 1);
}
