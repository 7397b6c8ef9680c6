//! Reading the original (LDM) layout: one file in which each component's tensors have a prefix.

use std::path::Path;
use std::sync::Arc;

use super::file::WeightFile;
use super::{Checkpoint, Group, refused};
use crate::Result;
use crate::family::tree::Depths;
use crate::family::{BaseNames, Family};

pub(super) fn open(path: &Path, file: Arc<WeightFile>, families: &[&'static Family]) -> Result<Checkpoint> {
    let mut names = BaseNames::default();
    names.add(None, file.shapes());
    let family = match Family::of_base(&names, families) {
        Some(family) if family.opens_single_file() => family,
        other => return Err(refused(path, other.ok_or(families), &names, &[Arc::clone(&file)])),
    };
    let mut checkpoint = Checkpoint::new(path, family);
    checkpoint.metadata = file.metadata();
    // A name without a dot may be a weight of its own.
    let is_weight = |name: &str| {
        let place = family.in_single_file(name);
        place.is_some_and(|(_, names, bare)| names.tree.weights(bare, &Depths::default()).is_some())
    };
    let is_known = |name: &&str| !is_no_weight(name) || !name.contains('.') && is_weight(name);
    let known: Vec<&str> = file.names().into_iter().filter(is_known).collect();
    for group in groups(family, &known).iter().filter(|group| !group.tensors.is_empty()) {
        checkpoint.add(path, &file, group)?;
    }
    let strange = known.iter().filter(|name| family.in_single_file(name).is_none());
    checkpoint.unused.extend(strange.map(|name| (*name).to_owned()));
    checkpoint.unused.sort();
    let marks = file.shapes().filter(|(name, _)| !name.contains('.'));
    checkpoint.marks = marks.map(|(name, shape)| (name.to_owned(), shape.contains(&0))).collect();
    checkpoint.complete()
}

/// The tensors of a single file by component.
pub(crate) fn groups<'n>(family: &Family, names: &[&'n str]) -> Vec<Group<'n>> {
    let group = |component, tree| {
        let own = |name: &&'n str| {
            let (of, _, bare) = family.in_single_file(name)?;
            (of == component).then_some((*name, bare))
        };
        Group::new(component, tree, names.iter().filter_map(own).collect())
    };
    let layouts = family.components.iter().filter_map(|own| Some((own.component, own.single_file?.tree)));
    layouts.map(|(component, tree)| group(component, tree)).collect()
}

/// Tensors that are no weights of the model in use: EMA copies, the schedule's buffers, marks, another model's.
fn is_no_weight(name: &str) -> bool {
    !name.contains('.') || name.starts_with("model_ema.") || name.starts_with("control_model.")
}
