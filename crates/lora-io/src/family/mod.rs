//! Families of base models as data: how their files are told, what they are made of, how each component is named in each
//! layout and format, what their files say of themselves. Checkpoints, merging, adapters' formats, metadata and
//! `consumers` all read these tables; nothing here reads a file.
//!
//! | here | what |
//! |---|---|
//! | `sd1`, `sd2`, `sdxl`, `sd3`, `anima`, `chroma`, `flux`, `flux2`, `qwen_image`, `z_image`, `language` | a family each |
//! | `tree` | the names of a network in a layout, both ways |
//! | `layers` | the layers of published models, in canonical names |
//! | `adapter` | which family an adapter was made for |
//! | `unknown` | what can be said of a base of none of these families |

pub mod adapter;
pub mod anima;
pub mod chroma;
pub mod flux;
pub mod flux2;
pub mod language;
pub mod layers;
pub mod qwen_image;
pub mod sd1;
pub mod sd2;
pub mod sd3;
pub mod sdxl;
pub mod tree;
mod unknown;
pub mod z_image;

pub(crate) use unknown::describe;

use std::fmt;

use lora_core::{Component, ModulePath};

use adapter::Signs;
use layers::Layer;
use tree::{Depths, Tree};

/// The families that are known here, in the order in which files are told apart: the first that fits is taken.
pub static FAMILIES: [&Family; 11] = [
    &anima::FAMILY,
    &flux2::FAMILY,
    &chroma::FAMILY,
    &flux::FAMILY,
    &sd3::FAMILY,
    &qwen_image::FAMILY,
    &z_image::FAMILY,
    &sdxl::FAMILY,
    &sd2::FAMILY,
    &sd1::FAMILY,
    &language::FAMILY,
];

/// The name of a family for people, or that there is none.
pub fn title(family: Option<&Family>) -> &'static str {
    family.map_or("no model that is known here", |family| family.title)
}

/// A family of base models: those whose files have the same names.
pub struct Family {
    /// A name for programs, `sdxl`.
    pub name: &'static str,
    /// The name for people.
    pub title: &'static str,
    /// Whether it makes pictures.
    pub image: bool,
    /// Whether a base of these names is of this family. Names decide, or the shape of one tensor where two families
    /// have the same names; never a width.
    pub tells: fn(&BaseNames<'_>) -> bool,
    /// What it is made of.
    pub components: &'static [ComponentNames],
    /// Words with underscores in module paths, for formats that write underscores for dots.
    pub words: &'static [&'static [&'static str]],
    /// How adapters for it are told.
    pub signs: Signs,
    /// What adapters for it say of their base.
    pub labels: Option<Labels>,
    /// The layers of the published model that adapters name; empty where consumers' rules for them are not known.
    pub layers: fn() -> Vec<Layer>,
    /// How many factors by block there are for the U-Net, as [`lora_core::strength::block`] counts them.
    pub block_factors: Option<usize>,
}

/// The names of one component.
#[derive(Debug)]
pub struct ComponentNames {
    /// The component.
    pub component: Component,
    /// Its folder in diffusers' layout and its names there.
    pub folder: Option<Names>,
    /// The prefix that its tensors have in a single file, and its names behind it.
    pub single_file: Option<Names>,
    /// How adapters in kohya's layout name its modules.
    pub kohya: Option<KohyaNames>,
    /// Whether a base without it is not whole.
    pub required: bool,
}

/// Where a component is found in a layout, and how its weights are named there.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// A folder, or a prefix with the dot at its end.
    pub place: &'static str,
    /// The names.
    pub tree: &'static dyn Tree,
}

/// kohya's names of a component's modules.
#[derive(Debug, Clone, Copy)]
pub struct KohyaNames {
    /// The prefix, without the underscore after it; one with a dot at its end stands before the path as it is, dots and all.
    pub prefix: &'static str,
    /// The tree that paths are of if they are not canonical, with the depths of the published model: an adapter does not
    /// show them.
    pub tree: Option<(&'static dyn Tree, Depths)>,
}

/// What files say of a base, in the words that the field's tools read.
#[derive(Debug, Clone, Copy)]
pub struct Labels {
    /// `ss_base_model_version` of a base that predicts the noise, and of one that predicts the velocity.
    pub version: [&'static str; 2],
    /// `modelspec.architecture` of these two, without `/lora`.
    pub architecture: [&'static str; 2],
    /// `modelspec.implementation`.
    pub implementation: &'static str,
    /// `ss_v2`.
    pub second_version: bool,
}

impl Labels {
    /// `ss_base_model_version` of a base that predicts the velocity, or the noise.
    pub fn version(&self, velocity: bool) -> &'static str {
        self.version[usize::from(velocity)]
    }

    /// `modelspec.architecture` of these two, without `/lora`.
    pub fn architecture(&self, velocity: bool) -> &'static str {
        self.architecture[usize::from(velocity)]
    }
}

impl Family {
    /// The first of these families that a base with these names is of.
    pub fn of_base(names: &BaseNames<'_>, families: &[&'static Family]) -> Option<&'static Family> {
        families.iter().copied().find(|family| (family.tells)(names))
    }

    /// The names of a component.
    pub fn component(&self, component: Component) -> Option<&ComponentNames> {
        self.components.iter().find(|names| names.component == component)
    }

    /// The component that a folder of diffusers' layout holds, and its names there.
    pub(crate) fn in_folder(&self, folder: &str) -> Option<(Component, Names)> {
        let found = |own: &ComponentNames| Some((own.component, own.folder.filter(|names| names.place == folder)?));
        self.components.iter().find_map(found)
    }

    /// The component that a tensor of a single file belongs to, its names, and the tensor's name behind the prefix.
    pub(crate) fn in_single_file<'n>(&self, name: &'n str) -> Option<(Component, Names, &'n str)> {
        let mut fitting = self.components.iter().filter_map(|own| {
            let names = own.single_file?;
            Some((own.component, names, name.strip_prefix(names.place)?))
        });
        let first = fitting.next()?;
        let (_, names, bare) = first;
        // Several components may stand behind the same prefix: then it is which knows the name.
        let knows = |names: &Names| names.tree.weights(bare, &Depths::default()).is_some();
        let mut others = fitting.filter(|(_, other, _)| other.place == names.place).peekable();
        if others.peek().is_none() || knows(&names) {
            return Some(first);
        }
        others.find(|(_, other, _)| knows(other)).or(Some(first))
    }

    /// Whether its networks can be opened from a single file.
    pub(crate) fn opens_single_file(&self) -> bool {
        self.components.iter().all(|own| own.single_file.is_some() || !own.required)
            && self.components.iter().any(|own| own.single_file.is_some())
    }

    /// The kohya name of a module; `None` where the layout has no name for it.
    pub fn kohya(&self, module: &ModulePath) -> Option<String> {
        let KohyaNames { prefix, tree } = self.component(module.component)?.kohya?;
        let path = match tree {
            None => module.path.clone(),
            Some((tree, depths)) => {
                let name = format!("{}.weight", module.path);
                match tree.stored(&name, &depths) {
                    Some((stored, _)) => stored.strip_suffix(".weight")?.to_owned(),
                    // One that could not be taken apart has the original tree's name.
                    None => tree.weights(&name, &depths).map(|_| module.path.clone())?,
                }
            }
        };
        Some(match prefix.strip_suffix('.') {
            Some(prefix) => format!("{prefix}.{path}"),
            None => format!("{prefix}_{}", path.replace('.', "_")),
        })
    }
}

impl PartialEq for Family {
    /// A family is its name.
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Family {}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Family({})", self.name)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.title)
    }
}

/// The names and shapes of a base's tensors: those of a folder with the folder of each component and a slash before them.
#[derive(Debug, Default)]
pub struct BaseNames<'f>(Vec<(String, &'f [usize])>);

impl<'f> BaseNames<'f> {
    /// Adds the tensors of a file in a folder of this name, or in none.
    pub fn add(&mut self, folder: Option<&str>, tensors: impl Iterator<Item = (&'f str, &'f [usize])>) {
        let named = |name: &str| folder.map_or_else(|| name.to_owned(), |folder| format!("{folder}/{name}"));
        self.0.extend(tensors.map(|(name, shape)| (named(name), shape)));
    }

    /// Whether a name begins so.
    pub fn begins(&self, start: &str) -> bool {
        self.0.iter().any(|(name, _)| name.starts_with(start))
    }

    /// Whether a name has this in it.
    pub fn contains(&self, part: &str) -> bool {
        self.0.iter().any(|(name, _)| name.contains(part))
    }

    /// The number of axes of the first tensor whose name begins and ends so.
    pub fn axes(&self, start: &str, end: &str) -> Option<usize> {
        let found = self.0.iter().find(|(name, _)| name.starts_with(start) && name.ends_with(end));
        found.map(|(_, shape)| shape.len())
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_families_and_their_components_are_unique() {
        let mut names: Vec<_> = FAMILIES.iter().map(|family| family.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), FAMILIES.len());
        for family in FAMILIES {
            for (index, own) in family.components.iter().enumerate() {
                assert_eq!(family.components.iter().position(|other| other.component == own.component), Some(index));
            }
        }
    }
}
