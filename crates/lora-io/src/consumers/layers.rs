//! The layers of a base model with their names in the layouts that consumers look for, from its family's tables.

use lora_core::Component;

use crate::family::Family;
pub(super) use crate::family::layers::Kind;
use crate::family::layers::Layer as FamilyLayer;

/// A layer of a base model.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    /// The network.
    pub(super) component: Component,
    /// The dotted path in diffusers' or transformers' module tree.
    pub(super) path: String,
    /// The dotted path in the original U-Net.
    pub(super) ldm: Option<String>,
    /// The prefix of its native kohya name, without the underscore after it.
    pub(super) prefix: &'static str,
    /// Its name in the kohya layout.
    pub(super) kohya: String,
    /// Which trainers reach it.
    pub(super) kind: Kind,
    /// Whether it is a projection of an attention.
    pub(super) is_attention: bool,
}

/// A path as kohya's layout has it: prefix and path joined, dots turned into underscores.
pub(super) fn underscored(prefix: &str, path: &str) -> String {
    format!("{prefix}_{}", path.replace('.', "_"))
}

/// The layers of a base of this family; none where they are not known.
pub(super) fn layers(base: &Family) -> Vec<Layer> {
    let layers = (base.layers)();
    let unet: Vec<&str> = layers.iter().filter(|layer| in_unet(layer)).map(|layer| layer.path.path.as_str()).collect();
    let original = base.component(Component::UNET).and_then(|names| names.single_file);
    let depths = original.map(|names| names.tree.depths_of_canonical(&unet));
    let named = |layer: &FamilyLayer| {
        let kohya = base.kohya(&layer.path)?;
        let ldm = original.zip(depths).filter(|_| in_unet(layer)).and_then(|(names, depths)| {
            let (name, _) = names.tree.stored(&format!("{}.weight", layer.path.path), &depths)?;
            Some(name.strip_suffix(".weight")?.to_owned())
        });
        let prefix = base.component(layer.path.component)?.kohya?.prefix;
        Some(Layer {
            component: layer.path.component,
            path: layer.path.path.clone(),
            ldm,
            prefix,
            kohya,
            kind: layer.kind,
            is_attention: layer.is_attention(),
        })
    };
    layers.iter().filter_map(named).collect()
}

fn in_unet(layer: &FamilyLayer) -> bool {
    layer.path.component == Component::UNET
}
