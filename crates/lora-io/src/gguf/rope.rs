//! The factors on the rotary frequencies that a GGUF model carries as a tensor (`rope_freqs.weight`), in the words of a
//! Hugging Face configuration. Llama 3.1's scaling is the one that llama.cpp's converter writes so.

use std::f64::consts::TAU;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::Result;

/// Factors equal to this are equal: the converter computes in f32 of another order.
const CLOSE: f64 = 1e-5;

/// `rope_scaling` of a configuration that gives these factors, one for each pair of a head's dimensions, at a base
/// frequency (`rope_theta`). `None` where no `llama3` scaling with the published shape (frequencies kept above 4, divided
/// below 1 turn of the original context) gives all of them.
pub(crate) fn llama3_scaling(factors: &[f32], theta: f64) -> Option<Value> {
    let largest = factors.iter().copied().fold(0.0f32, f32::max);
    if factors.is_empty() || !factors.iter().all(|factor| factor.is_finite() && *factor > 0.0) {
        return None;
    }
    let factor = f64::from(largest);
    let factor = if (factor - factor.round()).abs() < CLOSE * factor { factor.round() } else { factor };
    let fits = |original: f64| {
        factors.iter().enumerate().all(|(place, &found)| {
            let turns = original * theta.powf(-(place as f64) / factors.len() as f64) / TAU;
            (f64::from(found) / scaled(turns, factor) - 1.0).abs() < CLOSE
        })
    };
    // Published original contexts are powers of two.
    let original = (4..=24).map(|power| 1u64 << power).find(|&original| fits(original as f64))?;
    Some(json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": LOW, "high_freq_factor": HIGH,
        "original_max_position_embeddings": original,
    }))
}

const LOW: f64 = 1.0;
const HIGH: f64 = 4.0;

/// The factor on the wavelength of a frequency that makes so many turns within the original context.
fn scaled(turns: f64, factor: f64) -> f64 {
    let smooth = ((turns - LOW) / (HIGH - LOW)).clamp(0.0, 1.0);
    1.0 / ((1.0 - smooth) / factor + smooth)
}

/// Puts the scaling of a model's rotary frequencies into the `config.json` beside its weights; returns what a reader should
/// know of that, `None` where the file says it already.
///
/// # Errors
///
/// If the file cannot be written.
pub fn add_to_config(path: &Path, scaling: &Value) -> Result<Option<String>> {
    let text = std::fs::read(path).unwrap_or_default();
    let Ok(mut config) = serde_json::from_slice::<Map<String, Value>>(crate::json::without_mark(&text)) else {
        return Ok(Some(format!("the config.json of this model needs \"rope_scaling\": {scaling}")));
    };
    let tables = ["rope_scaling", "rope_parameters"].iter().filter_map(|key| config.get(*key)?.as_object());
    if let Some(found) = tables.into_iter().find(|table| table.contains_key("factor")) {
        let mut numbers = scaling.as_object().into_iter().flatten().filter(|(_, value)| value.is_number());
        let same = numbers.all(|(key, value)| found.get(key).and_then(Value::as_f64) == value.as_f64());
        let other =
            || format!("{} scales RoPE in another way than the file, whose factors are {scaling}", path.display());
        return Ok((!same).then(other));
    }
    config.insert("rope_scaling".into(), scaling.clone());
    let text = format!("{:#}\n", Value::from(config));
    crate::atomic::write(path, |file| std::io::Write::write_all(file, text.as_bytes()))?;
    Ok(Some(format!("{}: \"rope_scaling\": {scaling} was added", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_of_llama_3_are_its_scaling() {
        // transformers 5.17.0, `_compute_llama3_parameters` of theta 500000, heads of 16, factor 8, 64 positions: the
        // unscaled frequencies divided by the scaled ones.
        let factors = [1.0, 2.442_259_6, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0];
        let found = llama3_scaling(&factors, 500_000.0).unwrap();
        assert_eq!(
            (found["factor"].as_f64(), found["original_max_position_embeddings"].as_u64()),
            (Some(8.0), Some(64))
        );
        assert_eq!((found["low_freq_factor"].as_f64(), found["high_freq_factor"].as_f64()), (Some(1.0), Some(4.0)));
        let others = [1.0, 2.4, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0];
        assert_eq!(llama3_scaling(&others, 500_000.0), None);
        assert_eq!(llama3_scaling(&[f32::NAN], 10.0), None);
        assert_eq!(llama3_scaling(&[], 10.0), None);
    }
}
