//! The base of `assets/emoji-64`, which has learnt to draw: styles are learned on it, halved, joined and made smaller, which
//! random weights cannot show. How much of a style is there is told by the loss on held-out pictures of it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock};

use lora_core::backend::CpuBackend;
use lora_core::compose::resize;
use lora_core::rank::RankPolicy;
use lora_core::variant::VariantRegistry;
use lora_core::{Adapter, Strength};
use lora_io::merge::{MergeOptions, Weighted, merge};
use lora_train::config::{Format, TrainConfig};
use lora_train::{Plugins, Session};

const ASSETS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets");

/// One test at a time: libtorch takes all cores for each.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Pictures of one style with captions, and those held out.
struct Style {
    pictures: PathBuf,
    held_out: PathBuf,
}

/// What the quickstart learns.
fn black_ink() -> Style {
    let pictures = Path::new(ASSETS).join("quickstart");
    Style { held_out: pictures.join("held_out"), pictures }
}

/// The same drawings in white on black.
fn chalk(folder: &Path) -> Style {
    let ink = black_ink();
    let own = Style { pictures: folder.join("chalk"), held_out: folder.join("chalk_held_out") };
    for (from, to) in [(ink.pictures, &own.pictures), (ink.held_out, &own.held_out)] {
        std::fs::create_dir(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "png") {
                let mut picture = image::open(&path).unwrap().to_luma8();
                image::imageops::invert(&mut picture);
                picture.save(to.join(path.file_name().unwrap())).unwrap();
                let caption = path.with_extension("txt");
                std::fs::copy(&caption, to.join(caption.file_name().unwrap())).unwrap();
            }
        }
    }
    own
}

fn session(base: &Path, style: &Style, output: &Path, keys: &[&str]) -> Session {
    let text = format!(
        "base_model: {}\ntrain_data_dir: {}\noutput_dir: {}\nmax_resolution: 64\ndevice: cpu\nprecision: fp32\n\
         lora_rank: 8\ntarget_modules: attention-mlp\nlearning_rate: 2e-3\nbatch_size: 8\nmax_train_steps: 60\n",
        base.display(),
        style.pictures.display(),
        output.display(),
    );
    let config = TrainConfig::from_text(&text, Format::Yaml, keys).unwrap();
    Session::prepare(config, &Plugins::default(), &mut |_| {}).unwrap()
}

fn base() -> PathBuf {
    Path::new(ASSETS).join("emoji-64/emoji-64.safetensors")
}

struct Learned {
    adapter: Adapter,
    before: f64,
    after: f64,
}

fn learn(style: &Style) -> Learned {
    let folder = tempfile::tempdir().unwrap();
    let mut session = session(&base(), style, folder.path(), &[]);
    let held_out = session.load_validation(&style.held_out).unwrap();
    let before = session.validation_loss(&held_out).unwrap();
    while session.step().unwrap().is_some() {}
    let after = session.validation_loss(&held_out).unwrap();
    Learned { adapter: session.adapter().unwrap().export().unwrap(), before, after }
}

fn ink() -> &'static Learned {
    static INK: OnceLock<Learned> = OnceLock::new();
    INK.get_or_init(|| learn(&black_ink()))
}

/// The loss on held-out pictures of each style, of the base with adapters merged into its file.
fn merged(adapters: &[(&Adapter, f64)], styles: &[&Style]) -> Vec<f64> {
    let folder = tempfile::tempdir().unwrap();
    let weighted: Vec<Weighted> = adapters
        .iter()
        .enumerate()
        .map(|(index, &(adapter, strength))| Weighted {
            name: format!("adapter {index}"),
            adapter: adapter.clone(),
            strength: Strength::from(strength),
        })
        .collect();
    let path = folder.path().join("merged.safetensors");
    let variants = VariantRegistry::<CpuBackend>::default();
    merge(base(), &weighted, &path, &MergeOptions::default(), &variants, &|_, _| {}).unwrap();
    let mut session =
        session(&path, styles[0], &folder.path().join("out"), &["max_train_steps=1", "cache_latents=false"]);
    let loss = |style: &&Style| {
        let held_out = session.load_validation(&style.held_out).unwrap();
        session.validation_loss(&held_out).unwrap()
    };
    styles.iter().map(loss).collect()
}

#[test]
fn a_style_is_learned() {
    let _turn = turn();
    let Learned { before, after, .. } = ink();
    assert!(*after < 0.85 * before, "{before} {after}");
}

#[test]
fn half_of_a_lora_is_part_of_its_style() {
    let _turn = turn();
    let Learned { adapter, before, after } = ink();
    let loss = |strength| merged(&[(adapter, strength)], &[&black_ink()])[0];
    // What is merged is what was trained, but for the rounding of the base's fp16.
    let whole = loss(1.0);
    assert!((whole / after - 1.0).abs() < 0.01, "{whole} {after}");
    let gained = |loss: f64| (before - loss) / (before - whole);
    let (quarter, half) = (gained(loss(0.25)), gained(loss(0.5)));
    eprintln!("of what the whole gains: a quarter {quarter:.2}, half {half:.2}");
    assert!(0.05 < quarter && quarter < half && half < 0.95, "{quarter} {half}");
}

#[test]
fn a_smaller_lora_keeps_most_of_its_style() {
    let _turn = turn();
    let Learned { adapter, before, after } = ink();
    let gained = |rank| {
        let (smaller, _) = resize(adapter, RankPolicy::Fixed(rank)).unwrap();
        (before - merged(&[(&smaller, 1.0)], &[&black_ink()])[0]) / (before - after)
    };
    let (four, one) = (gained(4), gained(1));
    eprintln!("of what rank 8 gains: rank 4 {four:.2}, rank 1 {one:.2}");
    assert!(0.8 < four && one < four, "{four} {one}");
}

#[test]
fn two_loras_work_together() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let (ink_style, chalk_style) = (black_ink(), chalk(folder.path()));
    let (ink, chalk) = (ink(), learn(&chalk_style));
    let both = merged(&[(&ink.adapter, 0.5), (&chalk.adapter, 0.5)], &[&ink_style, &chalk_style]);
    eprintln!("ink {} {} {}; chalk {} {} {}", ink.before, ink.after, both[0], chalk.before, chalk.after, both[1]);
    // Each is still there, and neither is whole.
    for (both, alone) in both.into_iter().zip([ink, &chalk]) {
        assert!(alone.after < both && both < alone.before, "{} {both} {}", alone.before, alone.after);
    }
}
