//! ai-toolkit's `model`: the base, and how it is stored.

use crate::outcome::{becomes, lost, no_effect, taken};
use crate::row::{Kind, OFF, Row, by, gone, nothing, same};
use crate::tools::sd_scripts;

pub(super) static MODEL: &[Row] = &[
    by("name_or_path", &["base_model"], "a file or a folder", sd_scripts::program::base_model),
    by("arch", &[], "the base's files say it", |_| no_effect("the base's files say it")),
    nothing("is_v2 is_v3 is_xl is_flux is_pixart is_lumina2 is_auraflow", "the base's files say it"),
    by("is_v_pred", &["v_parameterization"], "on", |field| match field.on() {
        true => taken("v_parameterization", true),
        false => no_effect("the base says it"),
    }),
    nothing("dtype", "weights are in the precision of the run"),
    nothing("vae_dtype", "an autoencoder that overflows goes on in fp32"),
    nothing("te_dtype", "weights are in the precision of the run"),
    same("vae_path", "vae", Kind::Text),
    same("te_name_or_path", "text_encoder", Kind::Text),
    by("extras_name_or_path", &["text_encoder"], "where the other networks are", |field| {
        taken("text_encoder", field.text())
    }),
    by("quantize", &["base_storage"], "by qtype; fp8 where none is given", |field| {
        let qtype = field.here.text("qtype").unwrap_or_default();
        // Behind the bar stands the file of an adapter.
        let qtype = qtype.split('|').next().unwrap_or_default();
        let bits: String = qtype.chars().filter(char::is_ascii_digit).collect();
        field.when_on(match bits.as_str() {
            "2" | "3" | "4" => becomes("base_storage", "nf4", format!("{qtype} is nearest to nf4")),
            _ if qtype.contains("int") => becomes("base_storage", "int8", "with a factor for each output"),
            _ => becomes("base_storage", "fp8", "with a factor for each output"),
        })
    }),
    by("qtype", &[], "with quantize; the adapter behind its bar is not read", |field| {
        match field.text().contains('|') && field.here.on("quantize") {
            true => lost("no adapter makes up for fewer bits"),
            false => no_effect("with quantize"),
        }
    }),
    nothing("quantize_te qtype_te text_encoder_bits", "text encoders are gone once captions are encoded"),
    nothing("quantize_kwargs", "with quantize"),
    gone("accuracy_recovery_adapter", OFF, "no adapter makes up for fewer bits"),
    nothing("low_vram", "vram_budget says what there is"),
    by("layer_offloading", &["offload_base"], "all frozen weights are streamed", |field| {
        field.when_on(becomes("offload_base", true, "all frozen weights are streamed"))
    }),
    nothing("layer_offloading_transformer_percent layer_offloading_text_encoder_percent", "with layer_offloading"),
    gone("auto_memory", OFF, "vram_budget says what there is"),
    by("assistant_lora_path", &["fuse_adapters"], "merged into the base; there it is off in samples", |field| {
        becomes("fuse_adapters", vec![field.text()], "samples are drawn with it too")
    }),
    gone("inference_lora_path", OFF, "samples are drawn with the adapter alone"),
    by("lora_path", &["fuse_adapters"], "a LoRA in the base", |field| taken("fuse_adapters", vec![field.text()])),
    gone("refiner_name_or_path", OFF, "no refiner is used"),
    nothing("refiner_start_at", "no refiner is used"),
    gone("unet_path", OFF, "the base's own network is trained"),
    gone("attn_masking", OFF, "padding of captions is treated as the base says"),
    gone("split_model_over_gpus", OFF, "one device trains"),
    nothing("split_model_other_module_param_count_scale", "one device trains"),
    nothing("use_text_encoder_1 use_text_encoder_2", "the base says which"),
    nothing("experimental_xl", "the base's files say it"),
    nothing("use_flux_cfg", "guidance is not part of training"),
    nothing("compile", "how steps are computed"),
    nothing("vae_device te_device", "where networks are"),
    nothing("latent_space_version", "the base says it"),
    gone("only_if_contains ignore_if_contains", OFF, "layers are named by target_modules"),
    gone("model_kwargs model_paths", OFF, "nothing reads them"),
];
