//! What a component's `config.json` says beside the names and shapes of its weights. Single files have none: then each
//! network has its own rule.

use lora_io::checkpoint::ComponentWeights;
use serde_json::Value;

use crate::{Error, Result};

/// The value of a key; `None` without a config, without the key, or where its value is null.
pub(super) fn value<'c>(component: &'c ComponentWeights, key: &str) -> Option<&'c Value> {
    component.config()?.get(key).filter(|value| !value.is_null())
}

/// A value that is a number above zero.
pub(super) fn number(component: &ComponentWeights, key: &str) -> Result<Option<usize>> {
    read(component, key, "a whole number above 0", above_zero)
}

/// A value that is one number above zero, or a list of such.
pub(super) fn numbers(component: &ComponentWeights, key: &str) -> Result<Option<Vec<usize>>> {
    read(component, key, "a whole number above 0 or a list of them", |value| match value {
        Value::Array(each) => each.iter().map(above_zero).collect(),
        one => above_zero(one).map(|one| vec![one]),
    })
}

/// A value that is a number, whole or not.
pub(super) fn real(component: &ComponentWeights, key: &str) -> Result<Option<f64>> {
    read(component, key, "a number", Value::as_f64)
}

/// A value that is a list of so many numbers.
pub(super) fn reals<const COUNT: usize>(component: &ComponentWeights, key: &str) -> Result<Option<[f64; COUNT]>> {
    read(component, key, &format!("a list of {COUNT} numbers"), |value| {
        let numbers: Option<Vec<f64>> = value.as_array()?.iter().map(Value::as_f64).collect();
        numbers?.try_into().ok()
    })
}

/// How many heads of `head` numbers a state of `width` is, where positions turn numbers in groups of `together`.
pub(super) fn heads(component: &ComponentWeights, width: usize, head: usize, together: usize) -> Result<usize> {
    if head == 0 || !width.is_multiple_of(head) || !head.is_multiple_of(together) {
        return Err(wrong(component, format!("width {width} does not divide into heads of {head}")));
    }
    Ok(width / head)
}

/// Numbers of a head that are turned by each axis of a position: as the config says, and without one as published.
pub(super) fn axes<const COUNT: usize>(
    component: &ComponentWeights,
    head: usize,
    published: [usize; COUNT],
) -> Result<Vec<usize>> {
    let axes = numbers(component, "axes_dims_rope")?.unwrap_or_else(|| published.to_vec());
    if axes.len() != COUNT || axes.iter().sum::<usize>() != head {
        return Err(wrong(component, format!("axes {axes:?} of positions for heads of {head}")));
    }
    Ok(axes)
}

/// How many blocks of a list there are, each with the weight `end`.
pub(super) fn blocks(component: &ComponentWeights, list: &str, end: &str) -> usize {
    (0..).take_while(|index| component.contains(&format!("{list}.{index}.{end}"))).count()
}

/// Channels of the latents, of the numbers of a token of 2 × 2 that a transformer reads and of those that it answers with.
pub(super) fn channels(component: &ComponentWeights, inputs: usize, outputs: usize) -> Result<usize> {
    if inputs == outputs && inputs.is_multiple_of(4) {
        return Ok(inputs / 4);
    }
    let reason = format!(
        "transformer that takes {inputs} numbers a token and gives {outputs}; expected as many, four a channel (more is a model \
         that is told a second picture, which cannot be trained here)"
    );
    Err(wrong(component, reason))
}

fn above_zero(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|number| usize::try_from(number).ok()).filter(|&number| number > 0)
}

fn read<T>(
    component: &ComponentWeights,
    key: &str,
    expected: &str,
    convert: impl Fn(&Value) -> Option<T>,
) -> Result<Option<T>> {
    let Some(found) = value(component, key) else { return Ok(None) };
    let wrong = || wrong(component, format!("config.json: {key} is {found}; expected {expected}"));
    convert(found).map(Some).ok_or_else(wrong)
}

/// The error of a component that is not as a network needs it.
pub(super) fn wrong(component: &ComponentWeights, reason: String) -> Error {
    Error::Architecture { source_name: component.path().display().to_string(), reason }
}
