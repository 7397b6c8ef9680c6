//! OneTrainer's optimisation: rates, schedules, lengths, and its table `optimizer`. Which optimiser is taken for which is
//! [`optimisers`]'s.

use serde_json::json;

use super::is_flow;
use crate::engine::{Field, Scope};
use crate::outcome::{Outcome, becomes, instead, lost, no_effect, taken};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same, table};
use crate::tools::optimisers;
use crate::values;

pub(super) static ROWS: &[Row] = &[
    by("learning_rate", &["learning_rate"], "of what has none of its own", |field| {
        let own =
            ["transformer.learning_rate", "unet.learning_rate"].iter().any(|key| field.root.number(key).is_some());
        match own && is_flow(&field.root) {
            true => no_effect("the transformer has its own"),
            false => field.number_as("learning_rate"),
        }
    })
    .default("0.000003"),
    by("learning_rate_scheduler", &["lr_scheduler"], "by its name", |field| match field.text().as_str() {
        "COSINE_WITH_HARD_RESTARTS" => taken("lr_scheduler", "cosine_with_restarts"),
        // There the cosine goes up again as it went down.
        "COSINE_WITH_RESTARTS" => instead(
            vec![("lr_scheduler", "cosine".into())],
            "no schedule that rises again; a cosine stands in its place",
        ),
        "REX" => instead(
            vec![("lr_scheduler", "rex".into())],
            "REX by its paper; the curve of that name has other constants there",
        ),
        name => optimisers::schedule(&name.to_ascii_lowercase()),
    })
    .default("\"CONSTANT\""),
    by(
        "learning_rate_warmup_steps",
        &["lr_warmup_steps"],
        "200 steps where none are given; a share up to 1",
        |field| match field.number() {
            Some(0.0) => no_effect("off, as without it"),
            Some(steps) => taken("lr_warmup_steps", values::of_number(steps)),
            None => field.expected("steps, or a share"),
        },
    )
    .default("200"),
    by("learning_rate_cycles", &["lr_scheduler_num_cycles"], "of `COSINE_WITH_HARD_RESTARTS`", |field| {
        match (field.root.text("learning_rate_scheduler").as_deref(), field.count()) {
            (Some("COSINE_WITH_HARD_RESTARTS"), Some(cycles @ 1..)) => taken("lr_scheduler_num_cycles", cycles),
            (_, Some(1)) => no_effect("1, as without it"),
            (Some("CONSTANT" | "LINEAR" | "ADAFACTOR" | "REX"), _) => no_effect("a number of cosines"),
            _ => lost("a cosine goes through once"),
        }
    }),
    same("learning_rate_min_factor", "lr_min_ratio", Kind::Positive),
    gone("custom_learning_rate_scheduler scheduler_params", OFF, "no schedules of one's own code"),
    gone("learning_rate_scaler", &["\"NONE\""], "learning_rate counts as it is; multiply it yourself"),
    gone("loss_scaler", &["\"NONE\""], "the loss is a mean; multiply learning_rate instead"),
    same("epochs", "epochs", Kind::Count).default("100"),
    same("batch_size", "batch_size", Kind::Count).default("1"),
    same("gradient_accumulation_steps", "gradient_accumulation_steps", Kind::Count),
    same("clip_grad_norm", "max_grad_norm", Kind::Number),
    by("ema", &["ema_decay"], "`OFF`, or with ema_decay", |field| match field.text().as_str() {
        "OFF" => no_effect("off, as without it"),
        _ => {
            let decay = field.root.number("ema_decay").unwrap_or(0.999);
            let interval = field.root.number("ema_update_step_interval").unwrap_or(5.0).max(1.0);
            becomes("ema_decay", decay.powf(1.0 / interval), "averaged at each step, by as much in all")
        }
    }),
    nothing("ema_decay ema_update_step_interval", "with ema"),
    table("optimizer", &[OPTIMIZER]),
];

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
