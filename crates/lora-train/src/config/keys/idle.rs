//! Keys that are given and change nothing, for want of another: they are told before the first step. A few that are
//! more likely a mistake than a leftover are refused where they are read.

use lora_data::DatasetOptions;
use lora_data::bucket::Framing;
use lora_data::caption::{CaptionOptions, WarmupLength};

use crate::config::{LrScheduler, TrainConfig};

/// Keys that change nothing in some configurations.
struct Idle {
    keys: &'static [&'static str],
    /// What is wanting, as it follows `without`.
    without: &'static str,
    /// Whether it is.
    is: fn(&TrainConfig) -> bool,
}

static ALL: &[Idle] = &[
    Idle {
        keys: &["huber_c", "huber_schedule", "huber_scale"],
        without: "loss_type huber or smooth_l1",
        is: |config| !matches!(config.extra.text("loss_type"), Some("huber" | "smooth_l1")),
    },
    Idle {
        keys: &["mask_dir", "alpha_mask", "invert_mask", "unmasked_weight", "prior_mask_weight"],
        without: "masked_loss",
        is: |config| !config.masked_loss,
    },
    Idle { keys: &["image_variations"], without: "cache_latents", is: |config| !config.cache_latents },
    Idle {
        keys: &["min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"],
        without: "enable_bucket",
        is: |config| all(config, |dataset| matches!(dataset.framing, Framing::Fixed(_))),
    },
    Idle {
        keys: &["keep_tokens"],
        without: "shuffle_caption, caption_tag_dropout_rate, token_warmup_step or trigger_word",
        // Tags that are kept keep their places before a trigger word, too.
        is: |config| {
            let moves = |own: &CaptionOptions| own.shuffle || !own.trigger_word.is_empty();
            captions(config, |own| !moves(own) && own.tag_dropout == 0.0 && !warms_up(own))
        },
    },
    Idle {
        keys: &["token_warmup_min"],
        without: "token_warmup_step",
        is: |config| captions(config, |own| !warms_up(own)),
    },
    Idle {
        keys: &["lr_min_ratio", "lr_decay_steps"],
        without: "a schedule that falls (lr_scheduler)",
        is: |config| matches!(config.lr_scheduler, LrScheduler::Constant | LrScheduler::InverseSqrt),
    },
    Idle {
        keys: &["lr_scheduler_num_cycles"],
        without: "lr_scheduler cosine_with_restarts",
        is: |config| config.lr_scheduler != LrScheduler::CosineWithRestarts,
    },
    Idle {
        keys: &["lr_scheduler_power"],
        without: "lr_scheduler polynomial",
        is: |config| config.lr_scheduler != LrScheduler::Polynomial,
    },
    Idle {
        keys: &["noise_offset_random_strength", "adaptive_noise_scale"],
        without: "noise_offset",
        is: |config| config.noise_offset == 0.0,
    },
    Idle {
        keys: &["multires_noise_discount"],
        without: "multires_noise_iterations",
        is: |config| config.extra.whole("multires_noise_iterations") == Some(0),
    },
    Idle {
        keys: &["ip_noise_gamma_random_strength"],
        without: "ip_noise_gamma",
        is: |config| config.extra.number("ip_noise_gamma") == Some(0.0),
    },
    Idle { keys: &["prior_prompt_weight"], without: "prior_prompt", is: |config| config.prior_prompt.is_none() },
    Idle {
        keys: &["slider_resolutions", "slider_steps", "slider_sample_guidance"],
        without: "sliders",
        is: |config| config.sliders.is_empty(),
    },
    Idle {
        keys: &[
            "sample_every_n_steps",
            "sample_every_minutes",
            "sample_max_new_tokens",
            "sample_temperature",
            "sample_top_p",
            "sample_seed",
            "sample_negative_prompt",
            "sample_steps",
            "sample_guidance_scale",
            "sample_sampler",
            "sample_resolution",
        ],
        without: "sample_prompts",
        is: |config| config.samples.prompts.is_empty(),
    },
    Idle { keys: &["logging_dir"], without: "log_with", is: |config| config.log_with.is_empty() },
    Idle {
        keys: &["allow_lower_resolution"],
        without: "auto or vram_budget",
        is: |config| !config.auto && config.vram_budget.is_none(),
    },
];

fn all(config: &TrainConfig, is: impl Fn(&DatasetOptions) -> bool) -> bool {
    config.datasets.iter().all(is)
}

fn captions(config: &TrainConfig, is: impl Fn(&CaptionOptions) -> bool) -> bool {
    all(config, |dataset| is(&dataset.captions))
}

fn warms_up(captions: &CaptionOptions) -> bool {
    captions.warmup != WarmupLength::Steps(0)
}

impl TrainConfig {
    /// What keys are given that change nothing, and for want of what; a line for each want.
    pub(crate) fn idle_keys(&self) -> Vec<String> {
        let line = |idle: &Idle| {
            let given: Vec<&str> = idle.keys.iter().copied().filter(|key| self.gives(key)).collect();
            let one = if given.len() == 1 { "changes" } else { "change" };
            let some = !given.is_empty() && (idle.is)(self);
            some.then(|| format!("{} {one} nothing without {}", given.join(", "), idle.without))
        };
        ALL.iter().filter_map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Format;
    use crate::config::keys::Keys;

    fn told(text: &str) -> Vec<String> {
        let text = format!("base_model = \"b\"\noutput_dir = \"o\"\ntrain_data_dir = \"d\"\n{text}");
        TrainConfig::from_text::<&str>(&text, Format::Toml, &[]).expect(&text).idle_keys()
    }

    #[test]
    fn every_key_of_the_list_is_one_and_is_told_where_it_is_idle() {
        let keys = Keys::default();
        for key in ALL.iter().flat_map(|idle| idle.keys) {
            assert!(keys.get(key).is_some(), "{key}");
        }
        assert_eq!(told(""), [""; 0]);
        // It divides captions whether they are shuffled or not.
        assert_eq!(told("keep_tokens_separator = \"|||\""), [""; 0]);
        assert_eq!(
            told(
                "huber_c = 0.2\nhuber_schedule = \"snr\"\nkeep_tokens = 1\nlr_min_ratio = 0.1\ncache_latents = false\nimage_variations = 3"
            ),
            [
                "huber_c, huber_schedule change nothing without loss_type huber or smooth_l1",
                "image_variations changes nothing without cache_latents",
                "keep_tokens changes nothing without shuffle_caption, caption_tag_dropout_rate, token_warmup_step or trigger_word",
                "lr_min_ratio changes nothing without a schedule that falls (lr_scheduler)",
            ]
        );
    }

    #[test]
    fn nothing_is_told_where_the_other_key_is_there() {
        for text in [
            "huber_c = 0.2\nloss_type = \"huber\"",
            "alpha_mask = true\nmasked_loss = true",
            "image_variations = 3\nprocessors = [\"random_crop\"]",
            "max_bucket_reso = 768\nenable_bucket = true",
            "keep_tokens = 1\nshuffle_caption = true",
            "keep_tokens = 1\ntrigger_word = \"sks\"",
            "token_warmup_min = 2\ntoken_warmup_step = 5",
            "lr_min_ratio = 0.1\nlr_scheduler = \"cosine\"",
            "lr_scheduler_num_cycles = 2\nlr_scheduler = \"cosine_with_restarts\"",
            "lr_scheduler_power = 2\nlr_scheduler = \"polynomial\"",
            "adaptive_noise_scale = 0.1\nnoise_offset = 0.1",
            "multires_noise_discount = 0.2\nmultires_noise_iterations = 6",
            "ip_noise_gamma_random_strength = true\nip_noise_gamma = 0.1",
            "prior_prompt_weight = 2\nprior_prompt = \"a cat\"",
            "sample_steps = 3\nsample_prompts = [\"a\"]",
            "logging_dir = \"l\"\nlog_with = \"csv\"",
            "allow_lower_resolution = true\nvram_budget = \"8GiB\"",
        ] {
            assert_eq!(told(text), [""; 0], "{text}");
            let alone = text.lines().next().unwrap();
            let alone = if alone.starts_with("image_variations") {
                "image_variations = 3\ncache_latents = false"
            } else {
                alone
            };
            assert_eq!(told(alone).len(), usize::from(!alone.starts_with("logging_dir")), "{alone}");
        }
    }
}
