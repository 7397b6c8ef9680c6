//! A component of a base from elsewhere: a file or folder of its own, or another base that has it.

use std::path::Path;
use std::sync::Arc;

use lora_core::Component;

use super::file::WeightFile;
use super::{Checkpoint, ComponentWeights, Group, diffusers};
use crate::family::tree::InGguf;
use crate::family::{BaseNames, ComponentNames, FAMILIES, Family, Names};
use crate::gguf::LanguageModel;
use crate::hub;
use crate::{Error, Result};

impl Checkpoint {
    /// Takes a component's weights from elsewhere: one file in the original layout, with the prefix that the component has in
    /// single files or without, or in diffusers' layout; one GGUF file as llama.cpp makes it; a folder with the component's files and its `config.json`; or a whole
    /// base of the same family.
    ///
    /// # Errors
    ///
    /// If the family has no such component, and if what is there is none: the message names a tensor that does not belong to it.
    pub fn replace(&mut self, component: Component, path: impl AsRef<Path>) -> Result<()> {
        let path = &*hub::place(path.as_ref())?;
        let names = self.family().components.iter().find(|own| own.component == component);
        let names = names.ok_or_else(|| self.lacks(component))?;
        let weights = match open(path, names)? {
            Some(weights) => weights,
            None => {
                let mut other = Self::open_among(path, &[&[self.family()], FAMILIES.as_slice()].concat())?;
                if other.family != self.family {
                    let reason = format!("is {}; expected parts of {}", other.family, self.family);
                    return Err(Error::format(path, reason));
                }
                other.components.remove(&component).ok_or_else(|| other.lacks(component))?
            }
        };
        self.components.insert(component, weights);
        Ok(())
    }
}

/// The component by itself; `None` for a whole base.
fn open(path: &Path, names: &ComponentNames) -> Result<Option<ComponentWeights>> {
    let mut weights = ComponentWeights::new(path);
    if path.is_dir() {
        let Some(folder) = names.folder else { return Ok(None) };
        if path.join(folder.place).is_dir() || !path.join("config.json").exists() {
            return Ok(None);
        }
        for file in diffusers::open_files(path)? {
            add(&mut weights, &file, names.component, Names { place: "", ..folder })?;
        }
        weights.config = Some(crate::json::read(path.join("config.json"))?);
        return Ok(Some(weights));
    }
    let file = Arc::new(WeightFile::open(path)?);
    let mut refused = None;
    if matches!(*file, WeightFile::Gguf(..)) {
        match names.folder.or(names.single_file).and_then(|own| own.tree.in_gguf()) {
            Some(InGguf::LanguageModel) => {
                let model = LanguageModel::open(path)?;
                weights.config = Some(model.config()?);
                weights.gguf = Some(model);
                return Ok(Some(weights));
            }
            Some(InGguf::Tree(tree)) => match add(&mut weights, &file, names.component, Names { place: "", tree }) {
                Ok(()) => return Ok(Some(weights)),
                Err(error) => refused = Some(error),
            },
            None => {}
        }
    }
    let mut all = BaseNames::default();
    all.add(None, file.shapes());
    // A whole base has this component beside others.
    if Family::of_base(&all, &FAMILIES).is_some_and(|family| family.image) {
        return Ok(None);
    }
    let prefix = names.single_file.map(|own| own.place).unwrap_or_default();
    let has_prefix = file.names().into_iter().any(|name| name.starts_with(prefix));
    if has_prefix && !file.names().into_iter().all(|name| name.starts_with(prefix)) {
        return Ok(None);
    }
    let layouts = [
        names.single_file.map(|own| if has_prefix { own } else { Names { place: "", ..own } }),
        names.folder.map(|own| Names { place: "", ..own }),
    ];
    for layout in layouts.into_iter().flatten() {
        let mut weights = ComponentWeights::new(path);
        match add(&mut weights, &file, names.component, layout) {
            Ok(()) => return Ok(Some(weights)),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    let name = names.component.name().replace('_', " ");
    Err(refused.unwrap_or_else(|| Error::format(path, format!("is no {name} that is read from a file of its own"))))
}

/// Adds the tensors of a file under a layout's names.
fn add(weights: &mut ComponentWeights, file: &Arc<WeightFile>, component: Component, layout: Names) -> Result<()> {
    let tensors = file.names().into_iter().filter_map(|name| Some((name, name.strip_prefix(layout.place)?)));
    let group = Group::new(component, layout.tree, tensors.collect());
    for (stored, pieces) in group.weights() {
        let Some(pieces) = pieces else {
            let reason = format!("is no tensor of a {} of this base's kind", component.name().replace('_', " "));
            return Err(Error::tensor(file.path(), stored, reason));
        };
        for (canonical, piece) in pieces {
            weights.add(file, stored, canonical, piece)?;
        }
    }
    Ok(())
}
