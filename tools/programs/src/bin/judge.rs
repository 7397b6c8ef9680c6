//! Judges the small base model, and what a LoRA makes of it, by numbers that need no eye.
//!
//! `cargo run --release --bin judge -- base BASE PICTURES/held_out [SAMPLES.png]`
//!     how well the autoencoder keeps pictures, and on how many the right caption has a lower loss than a wrong one; draws
//!     samples of 40 prompts;
//! `cargo run --release --bin judge -- style CONFIG PICTURES/train [key=value …]`
//!     trains by a configuration and tells by how much the loss on held-out pictures falls, and how many of 40 samples a
//!     classifier of styles calls the new one, before and after. The classifier is trained on real pictures only.

use std::path::Path;

use lora_core::random::Stream;
use lora_data::RgbPicture;
use lora_data::figure::grid::{self, GridPicture, GridRow};
use lora_io::checkpoint::Checkpoint;
use lora_models::networks::load_vae;
use lora_models::weights::Held;
use lora_tools::{Answer, load_pictures, psnr, scaled};
use lora_torch::memory::host_memory;
use lora_torch::tch::nn::{self, Module, OptimizerConfig};
use lora_torch::tch::{Device, Kind, Tensor, manual_seed, no_grad};
use lora_train::base::Sample;
use lora_train::config::{Format, TrainConfig};
use lora_train::{Plugins, Session};

const STYLES: [&str; 4] = ["noto", "twemoji", "fluent", "gradient"];
const NEW_STYLE: i64 = STYLES.len() as i64;

/// What the base is asked for: each subject in each style that it knows well, and without naming one.
const SUBJECTS: [&str; 10] = [
    "red apple, fruit",
    "cat face, animal",
    "bus, vehicle",
    "tulip, flower",
    "hamburger, food",
    "penguin, bird",
    "guitar, musical instrument",
    "sailboat, boat",
    "octopus, sea animal",
    "rocket, aircraft",
];
const SAMPLE_STYLES: [&str; 4] = [", noto", ", twemoji", ", fluent", ""];

fn main() -> Answer<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["base", base, pictures] => judge_base(base, Path::new(pictures), None),
        ["base", base, pictures, samples] => judge_base(base, Path::new(pictures), Some(Path::new(samples))),
        ["style", config, pictures, overrides @ ..] => judge_style(config, Path::new(pictures), overrides),
        _ => Err("expected `base BASE PICTURES/held_out [SAMPLES.png]` or `style CONFIG PICTURES/train [key=value …]`"
            .into()),
    }
}

fn judge_base(base: &str, pictures: &Path, samples: Option<&Path>) -> Answer<()> {
    let vae = load_vae(&Checkpoint::open(base)?, Kind::Float, Device::Cpu, Held::default())?;
    let held_out = load_pictures(pictures)?;
    println!("autoencoder: {:.2} dB on {} pictures", no_grad(|| psnr(&vae, &held_out))?, held_out.size()[0]);

    let folder = pictures.display().to_string();
    let text = serde_json::json!({
        "base_model": base, "train_data_dir": folder, "output_dir": "out/judge", "max_resolution": 64,
        "precision": "fp32", "device": "cpu", "max_train_steps": 1, "sample_guidance_scale": 4, "sample_steps": 20,
    });
    let config = TrainConfig::from_text::<&str>(&text.to_string(), Format::Yaml, &[])?;
    let mut session = Session::prepare(config, &Plugins::default(), &mut |_| {})?;
    let validation = session.load_validation(pictures)?;
    let captions: Vec<String> = validation.captions().map(str::to_owned).collect();
    let style = |caption: &str| caption.rsplit(", ").next().unwrap_or_default().to_owned();
    // Another subject's caption in the same style: the next one in a fixed shuffled order.
    let mut order: Vec<usize> = (0..captions.len()).collect();
    Stream::new(7).shuffle(&mut order);
    let wrong = |index: usize| -> String {
        let place = order.iter().position(|&other| other == index).unwrap_or(0);
        let others = (1..order.len()).map(|step| &captions[order[(place + step) % order.len()]]);
        others
            .filter(|other| style(other) == style(&captions[index]) && **other != captions[index])
            .map(String::clone)
            .next()
            .unwrap_or_default()
    };
    let right_losses = session.validation_losses(&validation, |_, own| own.to_owned())?;
    let wrong_losses = session.validation_losses(&validation, |index, _| wrong(index))?;
    let better = right_losses.iter().zip(&wrong_losses).filter(|(right, wrong)| right < wrong).count();
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    println!(
        "captions: the right one has the lower loss on {better} of {} pictures ({:.1} %); mean {:.4} against {:.4}",
        right_losses.len(),
        100.0 * better as f64 / right_losses.len() as f64,
        mean(&right_losses),
        mean(&wrong_losses)
    );
    let Some(path) = samples else { return Ok(()) };
    let mut rows = Vec::new();
    for style in SAMPLE_STYLES {
        let prompts: Vec<String> = SUBJECTS.iter().map(|subject| format!("{subject}{style}")).collect();
        rows.push(row(style.trim_start_matches(", "), &draw(&mut session, &prompts)?));
    }
    grid::draw(&rows, &SUBJECTS.map(str::to_owned)).save(path)?;
    println!("samples: {}", path.display());
    Ok(())
}

fn draw(session: &mut Session, prompts: &[String]) -> lora_train::Result<Vec<RgbPicture>> {
    Ok(session.sample(prompts)?.into_iter().filter_map(Sample::into_picture).collect())
}

fn row(label: &str, pictures: &[RgbPicture]) -> GridRow {
    let picture = |own: &RgbPicture| GridPicture { width: own.width(), height: own.height(), rgb: own.data().to_vec() };
    GridRow { label: label.to_owned(), pictures: pictures.iter().map(picture).collect() }
}

fn judge_style(config: &str, pictures: &Path, overrides: &[&str]) -> Answer<()> {
    let config = TrainConfig::from_file(config, overrides)?;
    let held_out = config.validation_data_dir.clone().ok_or("the configuration has no validation_data_dir")?;
    let classifier = Classifier::train(pictures, &config.datasets[0].path, &held_out)?;

    let output = config.output_dir.clone();
    let mut session = Session::prepare(config, &Plugins::default(), &mut |_| {})?;
    let validation = session.load_validation(&held_out)?;
    // The held-out subjects, and as many of those trained on.
    let (options, _) = TrainConfig::datasets_of::<&str>(None, Some(&session.config().datasets[0].path.clone()), &[])?;
    let trained = lora_data::Pictures::open(options, &lora_data::processor::ProcessorRegistry::default())?;
    let mut prompts: Vec<String> = validation.captions().map(str::to_owned).collect();
    prompts.extend(trained.items().iter().step_by(3).map(|item| item.caption.clone()).take(20));
    let before = (session.validation_loss(&validation)?, draw(&mut session, &prompts)?);
    let start = std::time::Instant::now();
    while session.step()?.is_some() {}
    let seconds = start.elapsed().as_secs_f64();
    let after = (session.validation_loss(&validation)?, draw(&mut session, &prompts)?);

    println!(
        "loss on held-out pictures: {:.4} before, {:.4} after ({:+.1} %)",
        before.0,
        after.0,
        100.0 * (after.0 / before.0 - 1.0)
    );
    for (when, pictures) in [("before", &before.1), ("after", &after.1)] {
        let share = classifier.share_of_new_style(pictures)?;
        println!("samples in the new style {when}: {:.0} % of {}", 100.0 * share, pictures.len());
    }
    let peak = host_memory().map_or(0, |host| host.peak >> 20);
    println!("{} steps in {seconds:.1} s; peak {peak} MiB", session.steps_done());
    for (index, columns) in prompts.chunks(10).enumerate() {
        let range = 10 * index..10 * index + columns.len();
        let rows = [row("before", &before.1[range.clone()]), row("after", &after.1[range])];
        grid::draw(&rows, columns).save(output.join(format!("style-{index}.png")))?;
    }
    Ok(())
}

/// Tells styles apart by pixels: four convolutions and a mean.
struct Classifier {
    network: nn::Sequential,
    _variables: nn::VarStore,
}

impl Classifier {
    fn train(base_styles: &Path, new_style: &Path, new_held_out: &Path) -> Answer<Self> {
        manual_seed(5);
        let variables = nn::VarStore::new(Device::Cpu);
        let root = variables.root();
        let mut network = nn::seq();
        for (layer, (inputs, outputs)) in [(3, 16), (16, 32), (32, 48), (48, 64)].into_iter().enumerate() {
            let config = nn::ConvConfig { stride: 2, padding: 1, ..Default::default() };
            network = network
                .add(nn::conv2d(&root / format!("conv{layer}"), inputs, outputs, 3, config))
                .add_fn(|hidden| hidden.relu());
        }
        network = network.add_fn(|hidden| hidden.mean_dim(&[2i64, 3][..], false, Kind::Float)).add(nn::linear(
            &root / "styles",
            64,
            NEW_STYLE + 1,
            Default::default(),
        ));

        let mut classes: Vec<Tensor> =
            STYLES.iter().map(|style| load_pictures(&base_styles.join(style))).collect::<Answer<_>>()?;
        classes.push(load_pictures(new_style)?);

        let mut optimiser = nn::AdamW::default().build(&variables, 2e-3)?;
        let mut random = Stream::new(6);
        for _ in 0..400 {
            let labels: Vec<i64> = (0..40).map(|_| random.below(classes.len() as u64) as i64).collect();
            let chosen: Vec<Tensor> = labels
                .iter()
                .map(|&label| {
                    let class = &classes[label as usize];
                    class.f_get(random.below(class.size()[0] as u64) as i64)
                })
                .collect::<Result<_, _>>()?;
            let answers = network.forward(&scaled(&Tensor::f_stack(&chosen, 0)?)?);
            optimiser.backward_step(&answers.cross_entropy_for_logits(&Tensor::from_slice(&labels)));
        }
        let classifier = Self { network, _variables: variables };
        let (known, new) = (&classes[..STYLES.len()], load_pictures(new_held_out)?);
        let mistaken: Vec<String> = known
            .iter()
            .zip(STYLES)
            .map(|(class, style)| Ok(format!("{style} {:.1} %", 100.0 * classifier.share(class)?)))
            .collect::<Answer<_>>()?;
        println!(
            "classifier: calls {:.1} % of real held-out pictures of the new style so, and of others {}",
            100.0 * classifier.share(&new)?,
            mistaken.join(", ")
        );
        Ok(classifier)
    }

    /// How many of `[count, 3, 64, 64]` bytes it calls the new style.
    fn share(&self, pictures: &Tensor) -> Answer<f64> {
        let classes = no_grad(|| Ok::<_, Box<dyn std::error::Error>>(self.network.forward(&scaled(pictures)?)))?;
        let new = classes.f_argmax(1, false)?.f_eq(NEW_STYLE)?.f_to_kind(Kind::Float)?;
        Ok(f64::try_from(new.f_mean(Kind::Double)?)?)
    }

    fn share_of_new_style(&self, pictures: &[RgbPicture]) -> Answer<f64> {
        let bytes: Vec<Tensor> = pictures
            .iter()
            .map(|picture| {
                let pixels = Tensor::from_slice(picture.data());
                pixels.f_view([picture.height() as i64, picture.width() as i64, 3])?.f_permute([2, 0, 1])
            })
            .collect::<Result<_, _>>()?;
        self.share(&Tensor::f_stack(&bytes, 0)?)
    }
}
