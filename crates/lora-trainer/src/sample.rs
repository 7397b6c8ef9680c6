//! `lora sample`: pictures of a base with adapters, or the base beside it at several strengths.

use std::path::PathBuf;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use lora_cli::Failure;
use lora_cli::arguments::strength_of;
use lora_core::strength::parse_prompt;
use lora_data::figure::grid::{self, GridPicture, GridRow};
use lora_data::{PromptLine, RgbPicture};
use lora_io::adapter;
use lora_train::Plugins;
use lora_train::inference::{AppliedAdapter, PictureModel, PictureModelOptions, PictureRequest};

use crate::failure::failure;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Base model: a file or a folder.
    #[arg(long, value_parser = lora_cli::arguments::base())]
    base: PathBuf,
    /// What to draw; several are drawn side by side. `<lora:NAME:0.8>` applies an adapter of --lora-dir, `--w 512 --h 768 --d 7
    /// --s 28 --l 6 --n "…" --ss ddim` say size, seed, steps, guidance, negative prompt and sampler of this prompt alone.
    #[arg(long = "prompt", required_unless_present = "prompts")]
    prompt: Vec<String>,
    /// A file of prompts, a line each.
    #[arg(long)]
    prompts: Option<PathBuf>,
    /// Adapter and strength for all prompts, `FILE:0.8`; `FILE:0.8:0.6` for text encoder and the rest; a third list gives
    /// factors by block.
    #[arg(long = "lora", value_name = "FILE[:STRENGTH]")]
    loras: Vec<String>,
    /// Where the adapters lie that prompts name.
    #[arg(long, default_value = ".")]
    lora_dir: PathBuf,
    /// What pictures shall not show.
    #[arg(long, default_value = "")]
    negative: String,
    /// Width and height, 512x768, or one side.
    #[arg(long)]
    size: Option<String>,
    /// Steps of the sampler.
    #[arg(long, default_value_t = 28)]
    steps: usize,
    /// How much the prompt counts (classifier-free guidance).
    #[arg(long)]
    guidance: Option<f64>,
    /// euler, euler_a, ddim or dpmpp_2m, where the base has them.
    #[arg(long)]
    sampler: Option<String>,
    /// Seed of the first picture's noise; each further one has the next.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Pictures of each prompt.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Draw the base beside the adapters at several strengths: a row for each.
    #[arg(long)]
    compare: bool,
    /// What --compare multiplies the adapters' strengths with.
    #[arg(long, value_delimiter = ',', default_values_t = [0.0, 0.5, 0.75, 1.0], requires = "compare", allow_negative_numbers = true)]
    strengths: Vec<f64>,
    /// Output: a .png file, of all pictures in a grid where they are several, or a folder for each picture and the grid.
    #[arg(long, default_value = "sample.png")]
    out: PathBuf,
    /// A key of a configuration, KEY=VALUE: device, precision, base_storage, offload_base, vae, vae_tiling, clip_skip …
    #[arg(long = "set", value_name = "KEY=VALUE")]
    keys: Vec<String>,
}

/// The pictures to draw and how they stand in the grid: row by row.
struct Layout {
    rows: Vec<String>,
    columns: Vec<String>,
    requests: Vec<PictureRequest>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let folder = arguments.out.extension().is_none();
    if !folder && !arguments.out.extension().is_some_and(|end| end.eq_ignore_ascii_case("png")) {
        let reason = "expected a .png file, or a folder";
        return Err(Failure::Usage(format!("--out {}: {reason}", arguments.out.display())));
    }
    if let Some(strength) = arguments.strengths.iter().find(|strength| !strength.is_finite()) {
        return Err(Failure::Usage(format!("--strengths: {strength} is no strength")));
    }
    let layout = layout(arguments)?;
    if arguments.compare && layout.requests.iter().all(|request| request.adapters.is_empty()) {
        return Err(Failure::Usage("--compare needs an adapter: --lora FILE, or <lora:NAME> in a prompt".into()));
    }
    let mut options = PictureModelOptions::new(&arguments.base);
    options.keys = keys(arguments);
    let mut model = PictureModel::open(&options, &Plugins::default()).map_err(failure)?;
    // An adapter that does not fit is told before the base is loaded.
    for adapter in layout.requests.iter().flat_map(|request| &request.adapters) {
        model.read(&adapter.path).map_err(failure)?;
    }
    model.notes().iter().for_each(|note| eprintln!("note: {note}"));
    let target = if folder { Some(arguments.out.as_path()) } else { arguments.out.parent() };
    if let Some(folder) = target.filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(|error| Failure::Work(format!("{}: {error}", folder.display())))?;
    }
    let (started, bar) = (Instant::now(), bar(layout.requests.len()));
    let mut failed = None;
    let pictures = model
        .draw(&layout.requests, &mut |index, picture| {
            bar.inc(1);
            if folder {
                let path = arguments.out.join(format!("{:04}.png", index + 1));
                failed = failed.take().or(GridPicture::from(picture).save(&path).err());
            }
        })
        .map_err(failure)?;
    bar.finish_and_clear();
    if let Some(error) = failed {
        return Err(error.into());
    }
    let path = if folder { arguments.out.join("grid.png") } else { arguments.out.clone() };
    match pictures.as_slice() {
        [one] if !folder => GridPicture::from(one).save(&path)?,
        [_] => {}
        _ => grid::write(&path, &rows(&layout, &pictures), &layout.columns)?,
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("{}: {} pictures, {seconds:.1} s", arguments.out.display(), pictures.len());
    Ok(())
}

/// What the arguments say as keys of a configuration; those of --set come last and win.
fn keys(arguments: &Arguments) -> Vec<String> {
    let text = |text: &str| serde_json::Value::from(text).to_string();
    let mut keys = vec![
        format!("sample_negative_prompt={}", text(&arguments.negative)),
        format!("sample_steps={}", arguments.steps),
    ];
    keys.extend(arguments.size.as_deref().map(|size| format!("sample_resolution={}", text(&size.replace('x', ",")))));
    keys.extend(arguments.guidance.map(|guidance| format!("sample_guidance_scale={guidance}")));
    keys.extend(arguments.sampler.as_deref().map(|sampler| format!("sample_sampler={sampler}")));
    keys.extend(arguments.keys.iter().cloned());
    keys
}

/// Which pictures there are: of each prompt `count`, and of these one at each strength.
fn layout(arguments: &Arguments) -> Result<Layout, Failure> {
    let mut lines = arguments.prompt.clone();
    if let Some(path) = &arguments.prompts {
        lines.extend(PromptLine::lines_of(path).map_err(failure)?);
    }
    if lines.is_empty() {
        return Err(Failure::Usage("there is no prompt".into()));
    }
    let global: Vec<AppliedAdapter> = arguments.loras.iter().map(|lora| applied(lora)).collect::<Result<_, _>>()?;
    let prompts: Vec<_> = lines.iter().map(|line| prompt(line, arguments, &global)).collect::<Result<_, _>>()?;
    let seeds = 0..u64::from(arguments.count);
    let of = |request: &PictureRequest, further: u64, factor: f64| {
        let mut request = request.clone();
        request.prompt.seed = Some(request.prompt.seed.unwrap_or(arguments.seed).wrapping_add(further));
        request.adapters.retain_mut(|adapter| {
            adapter.strength = adapter.strength.times(factor);
            factor != 0.0
        });
        request
    };
    let mut layout = Layout { rows: Vec::new(), columns: Vec::new(), requests: Vec::new() };
    if !arguments.compare {
        layout.columns = prompts.iter().map(|request| request.prompt.text.clone()).collect();
        for further in seeds {
            layout.rows.push(format!("seed {}", arguments.seed.wrapping_add(further)));
            layout.requests.extend(prompts.iter().map(|request| of(request, further, 1.0)));
        }
        return Ok(layout);
    }
    for request in &prompts {
        for further in seeds.clone() {
            let seed = request.prompt.seed.unwrap_or(arguments.seed).wrapping_add(further);
            layout.columns.push(format!("seed {seed}: {}", request.prompt.text));
        }
    }
    for &factor in &arguments.strengths {
        layout.rows.push(if factor == 0.0 { "base".into() } else { format!("x {factor}") });
        for request in &prompts {
            layout.requests.extend(seeds.clone().map(|further| of(request, further, factor)));
        }
    }
    Ok(layout)
}

/// A prompt with the adapters that it names and those for all prompts.
fn prompt(line: &str, arguments: &Arguments, global: &[AppliedAdapter]) -> Result<PictureRequest, Failure> {
    let mut prompt = PromptLine::parse(line);
    let (text, tags) = parse_prompt(&prompt.text).map_err(|error| Failure::Usage(error.to_string()))?;
    prompt.text = text.trim().to_owned();
    let mut adapters = global.to_vec();
    for tag in tags {
        if tag.dyn_rank.is_some() {
            let reason = "a number of ranks is not taken here; `lora resize` makes a smaller file";
            return Err(Failure::Usage(format!("<lora:{}>: {reason}", tag.name)));
        }
        let path = adapter::find(&arguments.lora_dir, &tag.name)
            .map_err(|error| Failure::Usage(format!("<lora:{}>: {error}", tag.name)))?;
        adapters.push(AppliedAdapter { path, strength: tag.strength });
    }
    Ok(PictureRequest { prompt, adapters })
}

fn applied(argument: &str) -> Result<AppliedAdapter, Failure> {
    let (path, strength) = strength_of(argument)?;
    Ok(AppliedAdapter { path: path.to_owned(), strength })
}

fn bar(pictures: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("drawing {bar:30} {pos}/{len} {per_sec} eta {eta}");
    let bar = ProgressBar::new(pictures as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.tick();
    bar
}

/// The grid's rows.
fn rows(layout: &Layout, pictures: &[RgbPicture]) -> Vec<GridRow> {
    let rows = layout.rows.iter().zip(pictures.chunks(layout.columns.len().max(1)));
    rows.map(|(label, pictures)| GridRow {
        label: label.clone(),
        pictures: pictures.iter().map(GridPicture::from).collect(),
    })
    .collect()
}
