//! What is said of a base and a configuration before anything is loaded: parts that are missing or belong to another base, sizes
//! of pictures that cannot be cut into tokens.

use lora_data::bucket::Framing;
use lora_io::checkpoint::Checkpoint;
use lora_io::family::anima::TEXT_CONDITIONER;

use super::kind::Kind;
use super::text::{self, EncoderKind, Reads};
use super::{VAE, anima, chroma, flux, flux2, qwen_image, sd3, z_image};
use crate::config::TrainConfig;
use crate::{Error, Result};

/// The kinds that are known here.
static KINDS: [&Kind; 7] =
    [&z_image::KIND, &flux::KIND, &chroma::KIND, &flux2::KIND, &sd3::KIND, &qwen_image::KIND, &anima::KIND];

/// Holds a base of one of these kinds against what a run needs beside its transformer; bases of other kinds are let be.
///
/// # Errors
/// [`Error::PartMissing`] with the key that names the part; [`Error::PartOfAnother`] for a text encoder of another width;
/// [`Error::Base`] for a base that is not trained here.
pub(in super::super) fn check_parts(checkpoint: &Checkpoint, config: &TrainConfig) -> Result<()> {
    let Some(kind) = KINDS.iter().find(|kind| kind.family == checkpoint.family()) else { return Ok(()) };
    if let Some(found) = (kind.refused)(checkpoint) {
        let (path, expected) = (checkpoint.path().to_owned(), kind.family.title.to_owned());
        return Err(Error::Base { path, found: found.to_owned(), expected });
    }
    let missing = |part, key, what| {
        let (path, family) = (checkpoint.path().to_owned(), kind.family.title);
        Err(Error::PartMissing { path, family, part, key, what })
    };
    if checkpoint.component(VAE).is_err() {
        let what = "the file or folder of its autoencoder (ae.safetensors), or a diffusers folder that has it";
        return missing("an autoencoder", "vae", what);
    }
    for encoder in kind.encoders {
        if checkpoint.component(encoder.component).is_err() {
            return missing("a text encoder", encoder.key, encoder.published);
        }
        if let Some(folder) = encoder.tokenizer
            && text::tokenizer(checkpoint, encoder.component, ["tokenizer", folder], config)?.is_none()
        {
            return missing("a tokenizer", "tokenizer", "a folder with the tokenizer.json of its text encoder");
        }
        let is_conditioned = matches!(encoder.reads, Reads::Conditioned(_));
        if is_conditioned && text::tokenizer(checkpoint, TEXT_CONDITIONER, text::T5_TOKENIZER, config)?.is_none() {
            return missing(
                "T5's tokenizer",
                "t5_tokenizer",
                "a folder with T5's tokenizer.json; T5 itself is not read",
            );
        }
        check_width(checkpoint, kind, encoder)?;
    }
    Ok(())
}

/// Holds the width of a language model's states against what reads them.
fn check_width(checkpoint: &Checkpoint, kind: &Kind, encoder: &EncoderKind) -> Result<()> {
    let (Some((reader, weight)), Reads::Language(reads) | Reads::Conditioned(reads)) =
        (kind.text_columns, &encoder.reads)
    else {
        return Ok(());
    };
    let own = checkpoint.component(encoder.component)?;
    let columns = |shape: Option<&[usize]>| shape.and_then(|shape| shape.get(1).copied());
    let read = columns(checkpoint.component(reader)?.shape(weight)).map(|columns| columns / reads.states.count());
    match (columns(own.shape("model.embed_tokens.weight")), read) {
        (Some(width), Some(read)) if width != read => Err(Error::PartOfAnother {
            path: own.path().to_owned(),
            found: format!("a text encoder of {width} numbers a state"),
            expected: format!("one of {read}, of {}", encoder.published),
            key: encoder.key,
        }),
        _ => Ok(()),
    }
}

/// Holds the sizes of pictures and samples against the number of pixels along a side of a token: all are cut into whole tokens.
///
/// # Errors
/// Where one cannot be.
pub(super) fn check_sides(config: &TrainConfig, multiple: usize) -> Result<()> {
    let fits = |(width, height): (usize, usize)| width % multiple == 0 && height % multiple == 0;
    let mut problems = Vec::new();
    for dataset in &config.datasets {
        match &dataset.framing {
            Framing::Buckets(buckets) if buckets.options().step % multiple != 0 => {
                let step = buckets.options().step;
                problems.push(("bucket_reso_steps", format!("{step}; expected a multiple of {multiple}")));
            }
            Framing::Buckets(_) => {}
            framing => {
                let (wide, high) = framing.resolution();
                if !fits((wide, high)) {
                    problems.push(("max_resolution", format!("{wide}×{high}; expected multiples of {multiple}")));
                }
            }
        }
    }
    let sizes = if config.sliders.is_empty() { Vec::new() } else { config.slider_sizes() };
    for (wide, high) in sizes.into_iter().filter(|&size| !fits(size)) {
        let key = if config.slider_resolutions.is_empty() { "max_resolution" } else { "slider_resolutions" };
        problems.push((key, format!("{wide}×{high}; expected multiples of {multiple}")));
    }
    let (wide, high) = config.samples.resolution;
    if !config.samples.prompts.is_empty() && !fits((wide, high)) {
        problems.push(("sample_resolution", format!("{wide}×{high}; expected multiples of {multiple}")));
    }
    problems.dedup();
    if problems.is_empty() { Ok(()) } else { Err(config.refused(problems).into()) }
}
