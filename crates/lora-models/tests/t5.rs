//! The T5 encoder against transformers on a tiny model (`tools/golden/make_transformers.py`).

mod common;

use common::{CPU, distance, tensor, transformers};
use lora_models::layers::{Adaptable, Pass};
use lora_models::networks::{T5Config, T5Encoder};
use lora_models::weights::{SyntheticWeights, Weights};
use lora_torch::tch::{Kind, Tensor, no_grad};

const CONFIG: T5Config = T5Config {
    vocabulary: 160,
    width: 32,
    inner: 48,
    heads: 3,
    intermediate: 64,
    layers: 2,
    buckets: 32,
    max_distance: 128,
};

fn encoder(kind: Kind) -> T5Encoder {
    T5Encoder::new(&Weights::new(&SyntheticWeights::new("text_encoder_2"), kind, CPU), CONFIG).unwrap()
}

/// The two rows of the golden file.
fn tokens() -> Tensor {
    let row = |row: i64| (0..200).map(move |at| (31 * at * at + 7 * row) % 160);
    Tensor::from_slice(&(0..2).flat_map(row).collect::<Vec<i64>>()).view([2, 200])
}

#[test]
fn states_match_transformers() {
    let expected = tensor(&transformers("t5"), "states");
    for recompute in [false, true] {
        let pass = Pass { recompute, ..Pass::default() };
        let found = no_grad(|| encoder(Kind::Float).forward(&tokens(), &pass).unwrap());
        let error = distance(&found, &expected);
        assert!(error < 1e-5, "recompute {recompute}: {error:e}");
    }
    assert!(encoder(Kind::Float).forward(&tokens().view([-1]), &Pass::default()).is_err());
    assert_eq!(encoder(Kind::Float).adaptable_layers().unwrap().len(), 14);
}

#[test]
fn what_fills_rows_up_may_be_unseen() {
    let expected = tensor(&transformers("t5"), "seeing_150");
    let states = |seen: i64, length: i64| {
        let tokens = tokens().narrow(1, 0, length);
        no_grad(|| encoder(Kind::Float).forward_seeing(seen, &tokens, &Pass::default())).unwrap()
    };
    let found = states(150, 200).slice(1, 0, None, 10);
    let error = distance(&found, &expected);
    assert!(error < 1e-5, "{error:e}");
    // One token behind those that are seen has the same state wherever the row ends.
    let error = distance(&states(150, 151), &states(150, 200).narrow(1, 0, 151));
    assert!(error < 1e-5, "{error:e}");
}

#[test]
fn states_in_half_precision_are_near() {
    let expected = tensor(&transformers("t5"), "states");
    for (kind, bound) in [(Kind::Half, 1e-2), (Kind::BFloat16, 6e-2)] {
        let found = no_grad(|| encoder(kind).forward(&tokens(), &Pass::default()).unwrap());
        assert_eq!(found.kind(), kind);
        let error = distance(&found.to_kind(Kind::Float), &expected);
        assert!(error < bound, "{kind:?}: {error:e}");
    }
}
