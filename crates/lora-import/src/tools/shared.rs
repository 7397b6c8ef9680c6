//! What rows of several trainers decide alike: prompts of samples, buckets without limits, steps of pictures, several
//! resolutions of one dataset.

use serde_json::{Value, json};

use crate::config::Draft;
use crate::engine::Scope;
use crate::input::Problem;
use crate::outcome::{Outcome, becomes, no_effect, translated};
use crate::report::{Accounted, Verdict};
use crate::values;

/// A prompt as a line with what its sample says of it: the keys of the negative prompt, of width, height, seed, steps
/// and guidance.
pub(super) fn prompt(prompt: String, sample: &Value, keys: [&str; 6]) -> String {
    let mut line = prompt;
    for (flag, key) in ["--n", "--w", "--h", "--d", "--s", "--l"].into_iter().zip(keys) {
        let value = sample.get(key).and_then(values::text).filter(|value| !value.is_empty());
        line.extend(value.map(|value| format!(" {flag} {value}")));
    }
    line
}

/// What becomes of the key that holds them.
pub(super) fn prompts(lines: Vec<String>) -> Outcome {
    match lines.is_empty() {
        true => no_effect("no prompts"),
        false => becomes("sample_prompts", json!(lines), "a line each"),
    }
}

/// Buckets by area without limits: sides up to twice the largest resolution.
pub(super) fn buckets(sides: impl Iterator<Item = u64>) -> Outcome {
    let largest = sides.max().unwrap_or(512);
    translated(
        vec![("enable_bucket", true.into()), ("max_bucket_reso", largest.saturating_mul(2).min(4096).into())],
        "sd-scripts' buckets, whose sides differ a little",
    )
}

/// What pictures go through: a crop, drawn or not, and what is drawn at each visit.
pub(super) fn processors(random_crop: bool, further: &[(&str, bool)]) -> Outcome {
    let crop = if random_crop { "random_crop" } else { "center_crop" };
    let on = further.iter().filter(|(_, on)| *on).map(|(name, _)| *name);
    let all: Vec<&str> = std::iter::once(crop).chain(on).collect();
    becomes(
        "processors",
        json!(all),
        "a step of what pictures go through; what is random is drawn at each visit with cache_latents = false, otherwise once for each of image_variations",
    )
}

/// Each of several resolutions is a dataset of its own, and masks count where there are any.
pub(super) fn split(_: &Scope<'_>, draft: &mut Draft, _: &mut Vec<Accounted>) -> Result<(), Problem> {
    draft.split("max_resolution");
    if draft.has("mask_dir") || draft.has("alpha_mask") {
        let place = "datasets";
        let verdict = Verdict::Translated("masks of datasets count".to_owned());
        draft
            .set(None, "masked_loss", &true.into(), place, &verdict, false)
            .map_err(|error| Problem::of(place, error))?;
    }
    Ok(())
}
