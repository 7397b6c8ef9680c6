//! diffusers' conversions of adapters for transformers (0.42.1): which of a layer's tensors each takes, under which of
//! the spellings of its name. A conversion is chosen by what is anywhere in the file, and each has other words for what
//! it does not take: an error, a warning, nothing. All of it was seen running on tiny models but for Anima, which was
//! read, not run.

use std::collections::BTreeMap;

use super::transformers::{Own, Spelling};
use super::{Cure, Effect, Inventory};
use crate::family::{Family, anima, chroma, flux, flux2, qwen_image, sd3, z_image};

/// What becomes of a layer's tensors.
pub(super) enum Fate {
    Loads,
    /// It loads, and this is to be said of it.
    Said(Effect, &'static str, Option<Cure>),
    Ignored(&'static str, Option<Cure>),
    Refused(&'static str, Option<Cure>),
}

use Fate::{Ignored, Loads, Refused, Said};

/// Which tensors a layer has.
#[derive(Debug, Default, Clone, Copy)]
struct Layer {
    down: bool,
    up: bool,
    a: bool,
    b: bool,
    alpha: Option<f64>,
    rank: usize,
    lokr: bool,
    other: bool,
}

impl Layer {
    fn is_pair(self) -> bool {
        self.a && self.b && !self.down && !self.up
    }

    fn is_kohya(self) -> bool {
        self.down && self.up && !self.a && !self.b
    }

    fn is_plain(self) -> bool {
        !self.lokr && !self.other
    }
}

/// What a file shows as a whole, and its layers by their names there.
pub(super) struct Conversion<'i> {
    base: &'static Family,
    layers: BTreeMap<&'i str, Layer>,
    kohya_factors: bool,
    alphas: bool,
    lokr: bool,
    /// Whether a name begins so.
    unet: bool,
    generic: bool,
    dotted: bool,
    legacy: bool,
    /// The most frequent alpha.
    common_alpha: Option<f64>,
}

/// The module that a key belongs to: what stands before its part.
pub(super) fn module_of(key: &str) -> &str {
    crate::adapter::parts::split(key).map_or(key, |(module, _)| module)
}

impl<'i> Conversion<'i> {
    pub(super) fn of(inventory: &'i Inventory, base: &'static Family) -> Self {
        let mut layers = BTreeMap::<&str, Layer>::new();
        for (key, (_, shape)) in inventory.tensors.iter().filter(|(key, _)| !key.ends_with(".dora_scale")) {
            let layer = layers.entry(module_of(key)).or_default();
            let first = shape.first().copied().unwrap_or(0);
            match key {
                _ if key.ends_with(".lora_down.weight") => (layer.down, layer.rank) = (true, first),
                _ if key.ends_with(".lora_up.weight") => layer.up = true,
                _ if key.ends_with(".lora_A.weight") => (layer.a, layer.rank) = (true, first),
                _ if key.ends_with(".lora_B.weight") => layer.b = true,
                _ if key.ends_with(".alpha") => {
                    layer.alpha = Some(inventory.scalars.get(key).copied().unwrap_or(f64::NAN));
                }
                _ if key.contains(".lokr_") => layer.lokr = true,
                // DoRA as PEFT has it is taken where PEFT's names are; a bias goes by itself.
                _ if key.contains(".lora_magnitude_vector") || key.ends_with(".diff_b") => {}
                _ => layer.other = true,
            }
        }
        let begins = |start: &str| layers.keys().any(|name| name.starts_with(start));
        let mut counts: Vec<(f64, usize)> = Vec::new();
        for alpha in layers.values().filter_map(|layer| layer.alpha) {
            match counts.iter_mut().find(|(value, _)| *value == alpha) {
                Some((_, count)) => *count += 1,
                None => counts.push((alpha, 1)),
            }
        }
        Self {
            base,
            kohya_factors: layers.values().any(|layer| layer.down),
            alphas: !counts.is_empty(),
            lokr: layers.values().any(|layer| layer.lokr),
            unet: begins("lora_unet_"),
            generic: begins("diffusion_model."),
            dotted: begins("transformer."),
            legacy: begins("lora_transformer_"),
            common_alpha: counts.iter().max_by_key(|(_, count)| *count).map(|(alpha, _)| *alpha),
            layers,
        }
    }

    fn is(&self, families: &[&Family]) -> bool {
        families.contains(&self.base)
    }

    /// What helps where a layer's names or parts do not load.
    fn cure(&self, layer: Layer) -> Option<Cure> {
        let dotted = self.is(&[&sd3::FAMILY, &anima::FAMILY]);
        Some(match layer.is_plain() {
            true if dotted => Cure::ToDiffusers,
            true => Cure::ToKohya,
            false if dotted => Cure::Merge,
            false => Cure::Flatten,
        })
    }

    /// Whether the file, or a key of it, is refused before names are looked at: what has `lora` in no name is no LoRA.
    pub(super) fn is_foreign(&self, key: &str) -> bool {
        self.is(&[&sd3::FAMILY, &anima::FAMILY]) && !key.contains("lora")
    }

    /// What becomes of a layer of the transformer, under its name in the file.
    pub(super) fn fate(&self, name: &str, own: &Own) -> Fate {
        let layer = self.layers.get(name).copied().unwrap_or_default();
        if self.is(&[&flux::FAMILY, &chroma::FAMILY]) {
            if self.kohya_factors { self.of_flux(layer, own) } else { self.of_flux_pairs(layer, own) }
        } else if self.is(&[&qwen_image::FAMILY, &z_image::FAMILY]) {
            self.of_flat_names(layer, own)
        } else if self.is(&[&flux2::FAMILY]) {
            self.of_flux_2(layer, own)
        } else {
            self.unconverted(layer, own)
        }
    }

    /// FLUX.1 and Chroma, where any factor is kohya's.
    fn of_flux(&self, layer: Layer, own: &Own) -> Fate {
        let cure = self.cure(layer);
        let spelling = own.spelling;
        if self.dotted {
            return match spelling {
                Spelling::Diffusers if own.canonical && (layer.is_kohya() || layer.is_pair()) => {
                    let changes = layer.alpha.is_some_and(|alpha| alpha != layer.rank as f64);
                    let reason = "alphas beside names that begin with `transformer.` are not looked at";
                    if changes { Said(Effect::Wrong, reason, cure) } else { Loads }
                }
                _ => Ignored("names that begin with `transformer.` are in the file: all others are passed over", cure),
            };
        }
        if self.legacy && spelling != Spelling::Legacy {
            return Ignored("OneTrainer's older names are in the file: all others are passed over", cure);
        }
        match spelling {
            Spelling::Bare | Spelling::Lycoris | Spelling::Diffusers => {
                Refused("a spelling that the conversion passes over, so that nothing of a LoRA is left", cure)
            }
            _ if !layer.is_plain() || !layer.is_kohya() => {
                Refused("left over after the conversion, or half a pair, which is an error", cure)
            }
            Spelling::Legacy if own.canonical => Loads,
            _ if !own.original => Refused("left over after the conversion, which is a ValueError", cure),
            _ if !own.path.contains("_blocks.") => Ignored(
                "layers outside of the blocks are renamed and then passed over in silence",
                Some(Cure::ToDiffusers),
            ),
            _ => Loads,
        }
    }

    /// FLUX.1 and Chroma, where all factors are PEFT's.
    fn of_flux_pairs(&self, layer: Layer, own: &Own) -> Fate {
        let cure = self.cure(layer);
        let shared = self.common_alpha.filter(|alpha| layer.alpha.is_none() && *alpha != layer.rank as f64);
        match own.spelling {
            Spelling::Diffusers if own.canonical && layer.is_pair() && layer.is_plain() => match shared {
                Some(_) => Said(
                    Effect::Wrong,
                    "a layer without alpha gets the most frequent alpha of the others, not its rank",
                    cure,
                ),
                None => Loads,
            },
            _ => Ignored("a spelling that this pipeline passes over in silence", cure),
        }
    }

    /// Qwen-Image and Z-Image, whose conversion takes prefixes away.
    fn of_flat_names(&self, layer: Layer, own: &Own) -> Fate {
        let cure = self.cure(layer);
        let is_z = self.is(&[&z_image::FAMILY]);
        let passed = "a spelling that this pipeline passes over in silence";
        let foreign = "renamed to a name that no layer has, which is an error";
        let bare = matches!(own.spelling, Spelling::Generic | Spelling::Bare) && own.canonical;
        if is_z && self.lokr {
            let converts = self.alphas || self.generic;
            return match own.spelling {
                _ if layer.lokr && bare && converts => Loads,
                Spelling::Diffusers if layer.lokr && own.canonical && !converts => Loads,
                _ if converts => Refused(foreign, cure),
                _ => Ignored(passed, cure),
            };
        }
        if !(self.alphas || self.unet || self.generic) {
            return match own.spelling {
                Spelling::Diffusers if layer.is_pair() && layer.is_plain() && own.canonical => Loads,
                Spelling::Diffusers => Refused("no pair of `lora_A` and `lora_B`, which is an error here", cure),
                _ => Ignored(passed, cure),
            };
        }
        let known = bare || own.spelling == Spelling::Kohya && (own.original || own.canonical);
        let mixed = self.kohya_factors && !layer.is_kohya() || is_z && self.unet && layer.is_pair();
        match own.spelling {
            _ if !layer.is_plain() || mixed || !layer.is_kohya() && !layer.is_pair() => {
                Refused("left over after the conversion, or half a pair, which is an error", cure)
            }
            _ if known => Loads,
            _ => Refused(foreign, cure),
        }
    }

    /// FLUX.2, which takes LoKr under three spellings.
    fn of_flux_2(&self, layer: Layer, own: &Own) -> Fate {
        let cure = self.cure(layer);
        let passed = "a spelling that this pipeline passes over in silence";
        let swapped = own.path == "final_layer.adaLN_modulation.1";
        let exchanged = "the halves of this layer's rows are not exchanged as they have to be";
        let of_halves = || Said(Effect::Wrong, exchanged, Some(Cure::ToDiffusers));
        match own.spelling {
            _ if self.kohya_factors => match own.spelling {
                Spelling::Kohya if own.original && layer.is_kohya() && layer.is_plain() => {
                    if swapped {
                        of_halves()
                    } else {
                        Loads
                    }
                }
                _ => Ignored(passed, cure),
            },
            Spelling::Lycoris | Spelling::Bare if layer.lokr && own.canonical => Loads,
            Spelling::Generic if layer.lokr && own.original => Loads,
            Spelling::Diffusers if layer.lokr && own.canonical && !self.alphas => Loads,
            _ if self.lokr => {
                Refused("a name or a part that the conversion of LoKr does not know, which is an error", cure)
            }
            Spelling::Generic if own.original && swapped && layer.is_pair() => of_halves(),
            Spelling::Generic if layer.is_pair() && layer.is_plain() => Loads,
            Spelling::Diffusers if own.canonical && layer.is_pair() && layer.is_plain() => Loads,
            _ => Ignored(passed, cure),
        }
    }

    /// Stable Diffusion 3, of which nothing is converted, and Anima, of which names are.
    fn unconverted(&self, layer: Layer, own: &Own) -> Fate {
        let cure = self.cure(layer);
        let known = match own.spelling {
            Spelling::Diffusers => own.canonical,
            Spelling::Generic => own.original && self.is(&[&anima::FAMILY]),
            _ => false,
        };
        match known {
            true if layer.is_pair() && layer.is_plain() => Loads,
            true => Refused("no pair of `lora_A` and `lora_B`, which is an error here", cure),
            false => Ignored("a spelling that this pipeline passes over in silence", cure),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Consumer, Verdict, transformers};
    use super::*;

    #[derive(Clone, Copy)]
    enum Kind {
        Pairs,
        Kohya,
        Dora,
        Lokr,
    }

    fn module(inventory: Inventory, name: &str, kind: Kind) -> Inventory {
        match kind {
            Kind::Pairs => inventory.pair(name),
            Kind::Kohya => inventory.lora(name, 64, 64),
            Kind::Dora => inventory.lora(name, 64, 64).tensor(&format!("{name}.dora_scale"), &[64, 1]),
            Kind::Lokr => inventory
                .tensor(&format!("{name}.lokr_w1"), &[8, 8])
                .tensor(&format!("{name}.lokr_w2"), &[8, 8])
                .alpha(name, 4.0),
        }
    }

    fn verdict(inventory: &Inventory, base: &'static Family) -> Verdict {
        transformers::opinion(Consumer::Diffusers, inventory, base).verdict
    }

    fn letter(verdict: Verdict) -> char {
        match verdict {
            Verdict::Loads => 'L',
            Verdict::LoadsPart => 'P',
            Verdict::LoadsWrong => 'W',
            Verdict::NothingLoaded => 'N',
            _ => 'R',
        }
    }

    const PREFIXES: [&str; 6] = ["transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_", "lycoris_", ""];

    /// A letter for pairs, kohya's factors, DoRA and LoKr behind each of the prefixes.
    fn letters(base: &'static Family, modules: [&str; 2]) -> String {
        let row = |prefix: &str| -> String {
            let name = |module: &str| match prefix.ends_with('_') {
                true => format!("{prefix}{}", module.replace('.', "_")),
                false => format!("{prefix}{module}"),
            };
            let kinds = [Kind::Pairs, Kind::Kohya, Kind::Dora, Kind::Lokr].into_iter();
            kinds
                .map(|kind| {
                    let one = module(Inventory::default(), &name(modules[0]), kind);
                    // One of two layers has a magnitude.
                    let other = if matches!(kind, Kind::Dora) { Kind::Kohya } else { kind };
                    letter(verdict(&module(one, &name(modules[1]), other), base))
                })
                .collect()
        };
        PREFIXES.map(row).join(" ")
    }

    #[test]
    fn names_in_diffusers_tree_load_as_they_did_when_they_were_tried() {
        // diffusers 0.42.1 on tiny pipelines: how many layers had an adapter then, or which error came.
        let qwen = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.img_mlp.net.0.proj"];
        assert_eq!(letters(&qwen_image::FAMILY, qwen), "LRRR LLWR LLWR NRRR NRRR NLWR");
        let z = ["layers.0.attention.to_q", "layers.0.feed_forward.w1"];
        assert_eq!(letters(&z_image::FAMILY, z), "LRRR LLWL RLWR NRRR NRRR NLWL");
        let two = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.linear_in"];
        assert_eq!(letters(&flux2::FAMILY, two), "LNNR LNNR NNNR NNNR NNNL NNNL");
        let three = ["transformer_blocks.0.attn2.to_q", "transformer_blocks.0.attn.to_k"];
        assert_eq!(letters(&sd3::FAMILY, three), "LRRR NRRR NNNN NNNN NRRR NRRR");
    }

    #[test]
    fn parts_of_flux_1_load_as_they_did_when_they_were_tried() {
        let (qkv, proj) = ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_attn_proj");
        let base = || Inventory::default().lora(qkv, 96, 288).lora(proj, 96, 96);
        let of = |inventory: Inventory| letter(verdict(&inventory, &flux::FAMILY));
        let one = |name: &str, kind: Kind| of(module(Inventory::default(), name, kind));
        assert_eq!(of(base()), 'L');
        assert_eq!(of(base().alpha(qkv, 1.0)), 'L');
        assert_eq!(of(base().without(&format!("{qkv}.alpha"))), 'L');
        assert_eq!(of(base().tensor(&format!("{qkv}.dora_scale"), &[288, 1])), 'W');
        assert_eq!(of(base().tensor(&format!("{qkv}.lora_mid.weight"), &[4, 4])), 'R');
        assert_eq!(of(base().without(&format!("{qkv}.lora_up"))), 'R');
        assert_eq!(of(base().tensor(&format!("{qkv}.diff_b"), &[288])), 'W');
        let text = "lora_te1_text_model_encoder_layers_0";
        assert_eq!(of(base().lora(&format!("{text}_self_attn_q_proj"), 96, 96)), 'R');
        assert_eq!(of(base().lora(&format!("{text}_mlp_fc1"), 96, 192)), 'L');
        // LoKr and LoHa of kohya's names leave nothing, without a word.
        assert_eq!(one(qkv, Kind::Lokr), 'N');
        assert_eq!(of(Inventory::default().tensor(&format!("{qkv}.hada_w1_a"), &[96, 4])), 'N');
        assert_eq!(one("lora_unet_transformer_blocks_0_attn_to_q", Kind::Kohya), 'R');

        let to_q = "transformer.transformer_blocks.0.attn.to_q";
        let pairs = || Inventory::default().pair(to_q).pair("transformer.single_transformer_blocks.0.attn.to_q");
        assert_eq!(of(pairs()), 'L');
        assert_eq!(of(pairs().alpha(to_q, 2.0)), 'W', "the other layer gets this alpha too");
        assert_eq!(of(pairs().alpha(to_q, 8.0)), 'L', "which is its rank");
        assert_eq!(one(to_q, Kind::Kohya), 'W', "its alpha is lost");
        assert_eq!(of(Inventory::default().lora(to_q, 96, 96).without("alpha")), 'L');
        assert_eq!(one("diffusion_model.double_blocks.0.img_attn.qkv", Kind::Pairs), 'N');
        assert_eq!(one("diffusion_model.double_blocks.0.img_attn.qkv", Kind::Kohya), 'L');
        assert_eq!(one("lora_transformer_transformer_blocks_0_attn_to_q", Kind::Kohya), 'L');
        assert_eq!(one("lycoris_transformer_blocks_0_attn_to_q", Kind::Kohya), 'R');
    }
}
