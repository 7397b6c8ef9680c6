//! OneTrainer's settings of an optimiser, `optimizer` in its files. Which optimiser is taken for which is [`super::optimisers`]'s.

use serde_json::json;

use super::optimisers;
use crate::engine::{Field, Scope};
use crate::outcome::{Outcome, lost, no_effect};
use crate::row::{OFF, Row, by, gone, nothing};

/// What becomes of an optimiser's switch that none has here.
const NO_SWITCH: &str = "optimisers have no switch of this name";
/// And of a number.
const NO_NUMBER: &str = "the optimiser has no number of this name";
/// Why a switch that is there for some optimisers alone says nothing.
const OF_OTHERS: &str = "a setting of other optimisers";

pub(super) static OPTIMIZER: &[Row] = &[
    by("optimizer", &["optimizer"], "by its name; AdamW where none is given", |field| optimisers::named(&field.text()))
        .default("\"ADAMW\""),
    by("beta1", &["optimizer_args"], "the first of `betas`", betas),
    by("beta2", &["optimizer_args"], "the second of `betas`", betas),
    by("beta3", &["optimizer_args"], "of Prodigy, and CAME's third", |field| match optimiser(&field.root) {
        "came" => betas(field),
        _ => argument(field, "beta3"),
    }),
    by("eps", &["optimizer_args"], "its name here; Adafactor and CAME have two", |field| {
        match optimiser(&field.root) {
            ours @ ("adafactor" | "came") => match (field.number(), field.here.number("eps2")) {
                (Some(first), second) => {
                    let usual = if ours == "came" { 1e-16 } else { 1e-3 };
                    Outcome::Taken(optimisers::of_argument("eps", json!([first, second.unwrap_or(usual)])))
                }
                _ => field.expected("a number"),
            },
            _ => argument(field, "eps"),
        }
    }),
    nothing("eps2", "the second of Adafactor's and CAME's eps"),
    by("weight_decay", &["optimizer_args"], "its name here", |field| argument(field, "weight_decay")),
    by("d0", &["optimizer_args"], "of Prodigy", |field| argument(field, "d0")),
    by("d_coef", &["optimizer_args"], "of Prodigy", |field| argument(field, "d_coef")),
    by("growth_rate", &["optimizer_args"], "of Prodigy", |field| argument(field, "growth_rate")),
    by("slice_p", &["optimizer_args"], "of Prodigy", |field| argument(field, "slice_p")),
    by("decouple", &["optimizer_args"], "of Prodigy; off where it is not given", |field| switch(field, "decouple"))
        .default("false"),
    by("use_bias_correction", &["optimizer_args"], "of Prodigy", |field| switch(field, "use_bias_correction")),
    by("safeguard_warmup", &["optimizer_args"], "of Prodigy", |field| switch(field, "safeguard_warmup")),
    by("relative_step", &["optimizer_args"], "of Adafactor; off where it is not given", |field| {
        switch(field, "relative_step")
    })
    .default("false"),
    by("scale_parameter", &["optimizer_args"], "of Adafactor; off where it is not given", |field| {
        switch(field, "scale_parameter")
    })
    .default("false"),
    by("warmup_init", &["optimizer_args"], "of Adafactor", |field| switch(field, "warmup_init")),
    by("clip_threshold", &["optimizer_args"], "of Adafactor", |field| argument(field, "clip_threshold")),
    by("decay_rate", &["optimizer_args"], "of Adafactor", |field| argument(field, "decay_rate")),
    by("min_8bit_size", &["optimizer_args"], "of 8-bit AdamW", |field| argument(field, "min_8bit_size")),
    by("r", &["optimizer_args"], "of schedule-free AdamW", |field| argument(field, "r")),
    by("weight_lr_power", &["optimizer_args"], "of schedule-free AdamW", |field| argument(field, "weight_lr_power")),
    nothing("__version", "how files are kept"),
    gone("adam_w_mode amsgrad bias_correction block_wise", OFF, NO_SWITCH),
    nothing("capturable", "how steps are computed"),
    gone("centered differentiable", OFF, NO_SWITCH),
    nothing("foreach fsdp_in_use fused fused_back_pass is_paged", "how steps are computed"),
    gone("maximize nesterov no_prox", OFF, NO_SWITCH),
    nothing("use_triton", "how steps are computed"),
    gone(
        "decoupled_decay fixed_decay rectify degenerated_to_sgd ams_bound adanorm adam_debias cautious use_speed \
         use_cautious use_grams use_adopt use_orthograd nnmf_factor use_atan2 kourkoutas_beta MuonWithAuxAdam \
         muon_adam_regex normuon_variant low_rank_ortho accelerated_ns cautious_wd approx_mars",
        OFF,
        NO_SWITCH,
    ),
    nothing("compile", "how steps are computed"),
    gone(
        "spectral_normalization stochastic_sign centered_wd factored_2nd fisher_wd orthogonal_sinkhorn \
         normed_momentum snr_cond geometric_wd muon_adam_config weight_decouple",
        OFF,
        NO_SWITCH,
    ),
    nothing(
        "stochastic_rounding weight_decay_by_lr split_groups split_groups_mean factored factored_fp32 use_stableadamw \
         d_limiter use_schedulefree rms_rescaling centered_wd_mode state_precision orthogonal_gradient \
         quant_block_size log_every",
        OF_OTHERS,
    ),
    gone(
        "alpha dampening lr_decay initial_accumulator_value initial_accumulator max_unorm momentum optim_bits \
         percentile_clipping k xi n_sma_threshold prodigy_steps beta1_warmup min_beta1 schedulefree_c ns_steps \
         muon_hidden_layers muon_adam_lr muon_te1_adam_lr muon_te2_adam_lr beta2_normuon ortho_rank \
         sinkhorn_iterations nesterov_coef",
        OFF,
        NO_NUMBER,
    ),
];

pub(super) fn optimiser(root: &Scope<'_>) -> &'static str {
    optimisers::ours(&root.text("optimizer.optimizer").unwrap_or_else(|| "ADAMW".to_owned()))
}

fn argument(field: &Field<'_>, name: &'static str) -> Outcome {
    optimisers::argument(optimiser(&field.root), name, &field.value)
}

fn switch(field: &Field<'_>, name: &'static str) -> Outcome {
    let own = match name {
        "relative_step" | "scale_parameter" | "warmup_init" => "adafactor",
        _ => "prodigy",
    };
    match optimiser(&field.root) == own {
        true => Outcome::Taken(optimisers::of_argument(name, field.on().into())),
        false => no_effect(format!("a switch of {own}")),
    }
}

fn betas(field: &Field<'_>) -> Outcome {
    let ours = optimiser(&field.root);
    if ours == "adafactor" {
        return lost("of Adafactor only beta1, which is none here, is an average");
    }
    let second = if matches!(ours, "lion" | "stable_adamw") { 0.99 } else { 0.999 };
    let mut betas = vec![field.here.number("beta1").unwrap_or(0.9), field.here.number("beta2").unwrap_or(second)];
    if ours == "came" {
        betas.push(field.here.number("beta3").unwrap_or(0.9999));
    }
    Outcome::Taken(optimisers::of_argument("betas", json!(betas)))
}
