//! What is planned of a base of a program's own is what its run takes, byte by byte. One test, alone in its process, as whatever
//! another thread allocates would count too (see `plan_memory`).
//!
//! For one small picture they are equal. Of more pixels at once oneDNN computes the gradients of convolutions in another way, with
//! scratchpads of a few KiB that are not known: 0.2% here with the kernels of AVX-512, 2% with those of AVX2.

#[path = "../../../examples/examples/custom_base/base.rs"]
mod base;

use base::{PIXEL_DENOISER, write_untrained};
use lora_torch::memory::{count_host_allocations, host_allocations, reset_host_peak};
use lora_train::config::{Format, TrainConfig};
use lora_train::plan::{Phase, plan};
use lora_train::{Plugins, Session};

#[test]
fn predictions_for_a_base_of_a_programs_own_are_what_is_counted() {
    count_host_allocations().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    write_untrained(path("base.safetensors").as_ref()).unwrap();
    std::fs::create_dir(path("data")).unwrap();
    // One picture, visited four times, without a caption, as what stands in for it.
    let picture = image::RgbImage::from_fn(64, 64, |x, y| image::Rgb([90, x as u8, y as u8]));
    picture.save(path("data/a.png")).unwrap();
    std::fs::write(path("data/a.txt"), "").unwrap();
    let mut plugins = Plugins::default();
    plugins.register_base(PIXEL_DENOISER).unwrap();
    let text = format!(
        "base_model: {}\ntrain_data_dir: {}\noutput_dir: {}\nmax_resolution: 64\ndevice: cpu\nprecision: fp32\n\
         target_modules: [first, \"blocks.*\", last]\nlora_rank: 16\nmax_train_steps: 1\nrepeats: 4\n",
        path("base.safetensors"),
        path("data"),
        path("out"),
    );
    let validation = format!("validation_data_dir={}", path("data"));
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let is_wide = flags.contains("avx512f") && std::env::var_os("ONEDNN_MAX_CPU_ISA").is_none();
    let batches = if is_wide { 0.2 } else { 3.0 };
    for (keys, tolerance) in [
        (&[][..], 0.0),
        (&["gradient_checkpointing=true"], 0.0),
        (&["gradient_accumulation_steps=2"], 0.0),
        (&["base_storage=int8"], 0.0),
        (&["optimizer=adamw8bit"], 0.0),
        (&[&validation], 0.0),
        (&["batch_size=2"], batches),
        (&["batch_size=4", "gradient_checkpointing=true"], batches),
        (&["batch_size=4", "lora_rank=4"], batches),
    ] {
        // Within a budget that is enough, alternatives are not looked for.
        let keys = [keys, &["vram_budget=100GiB"]].concat();
        let config = TrainConfig::from_text_with(&text, Format::Yaml, &keys, &plugins).unwrap();
        let plan = plan(&config, &plugins).unwrap();
        assert!(plan.to_string().contains("load the pixel denoiser"), "{plan}");
        let predicted = |phases: &[Phase]| {
            let own = plan.as_configured.phases.iter().filter(|own| phases.contains(&own.phase));
            own.map(|own| own.parts.total()).max().unwrap()
        };
        reset_host_peak();
        let before = host_allocations().unwrap().live;
        let counted = || {
            let counted = host_allocations().unwrap().peak - before;
            reset_host_peak();
            counted
        };
        let agree = |predicted: u64, counted: u64, phase: &str| {
            let off = 100.0 * (predicted as f64 / counted as f64 - 1.0);
            println!("{keys:?}, {phase}: predicted {predicted}, counted {counted}, {off:+.4}%");
            assert!(off.abs() <= tolerance, "{keys:?}, {phase}: predicted {predicted}, counted {counted}");
        };
        let mut unplanned = config.clone();
        unplanned.vram_budget = None;
        let mut session = Session::prepare(unplanned, &plugins, &mut |_| {}).unwrap();
        agree(predicted(&[Phase::Examples, Phase::Captions, Phase::Loading]), counted(), "prepare");
        if let Some(folder) = config.validation_data_dir.clone() {
            let validation = session.load_validation(&folder).unwrap();
            session.validation_loss(&validation).unwrap();
            agree(predicted(&[Phase::Validation]), counted(), "validate");
        }
        while session.step().unwrap().is_some() {}
        agree(predicted(&[Phase::Training]), counted(), "train");
    }
}
