//! Which layers carry an adapter: names, globs, regular expressions and presets, matched against a model's own list.
//!
//! - A **preset**: `attention`, `attention-mlp` (what sd-scripts adapts by default), `all-linear` (PEFT's: every linear layer
//!   but a language model's head) or `all-conv`.
//! - A **name**: `to_q`, `ff.net.0.proj`, or a whole path. It matches the end of a path at a dot. The names that people
//!   know from language models and PEFT configs mean both networks: `q_proj` is the text encoder's `q_proj` and the
//!   U-Net's `to_q`, and so on.
//! - A **glob** (it contains `*`, `?`, `[` or `{`): matched against the whole path, with or without its component
//!   (`unet.down_blocks.*.to_q`); `*` crosses dots.
//! - A **regular expression** (prefix `re:`): the same, anchored at both ends.
//!
//! A target that matches nothing is an error with near names: a misspelt layer must not train silently without effect.

use std::collections::{BTreeMap, BTreeSet};

use globset::Glob;
use regex::Regex;

use crate::{Component, Error, LayerGeometry, ModulePath, Result};

/// A layer of the model that could carry an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetLayer {
    /// Where it is.
    pub path: ModulePath,
    /// Its shape.
    pub geometry: LayerGeometry,
}

/// Names that mean a layer of each network: the name people write, then the ends of paths it stands for.
const SYNONYMS: &[(&str, &[&str])] = &[
    ("q_proj", &["q_proj", "to_q"]),
    ("k_proj", &["k_proj", "to_k"]),
    ("v_proj", &["v_proj", "to_v"]),
    ("out_proj", &["out_proj", "to_out.0"]),
    ("to_out", &["to_out.0"]),
    ("fc1", &["fc1", "ff.net.0.proj"]),
    ("fc2", &["fc2", "ff.net.2"]),
];

const ATTENTION: &[&str] = &[
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "qkv_proj",
    "out_proj",
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
];

/// How the blocks of networks begin that are transformers.
const BLOCKS: &[&str] = &["layers.", "transformer_blocks.", "single_transformer_blocks."];

/// Whether a layer of such a block makes scales and gates of the time.
fn is_modulation(path: &str) -> bool {
    ["adaLN_modulation.", ".norm", "_mod."].iter().any(|part| path.contains(part))
}

/// Names of the presets.
pub(crate) const PRESETS: &[&str] = &["attention", "attention-mlp", "all-linear", "all-conv"];

/// A parsed list of targets.
#[derive(Debug, Clone)]
pub struct Targets(Vec<(String, Matcher)>);

#[derive(Debug, Clone)]
enum Matcher {
    Attention,
    AttentionMlp,
    AllLinear,
    AllConv,
    Ends(Vec<String>),
    Pattern(Regex),
}

impl Targets {
    /// Parses each entry; an empty list or a malformed pattern is an error.
    ///
    /// # Errors
    /// [`Error::NoMatch`] for an empty list, with what could be named; [`Error::Pattern`] for a malformed pattern.
    pub fn parse<S: AsRef<str>>(entries: &[S]) -> Result<Self> {
        if entries.is_empty() {
            return Err(Error::NoMatch {
                pattern: String::new(),
                hint: format!("name at least one layer or one of {}", PRESETS.join(", ")),
            });
        }
        entries
            .iter()
            .map(|entry| Ok((entry.as_ref().to_owned(), Matcher::parse(entry.as_ref())?)))
            .collect::<Result<_>>()
            .map(Self)
    }

    /// The layers that some entry matches, in the order given. Every entry must match at least one.
    ///
    /// # Errors
    /// [`Error::NoMatch`] for the first entry that matches no layer, with near names.
    pub fn select(&self, layers: &[TargetLayer]) -> Result<Vec<TargetLayer>> {
        match self.unmatched(layers).next() {
            Some(error) => Err(error),
            None => Ok(self.matched(layers)),
        }
    }

    /// The layers that some entry matches, in the order given, whether or not every entry matches one.
    pub fn matched(&self, layers: &[TargetLayer]) -> Vec<TargetLayer> {
        let wanted = |layer: &&TargetLayer| self.0.iter().any(|(_, matcher)| matcher.matches(layer));
        layers.iter().filter(wanted).cloned().collect()
    }

    /// An error for each entry that matches no layer.
    pub fn unmatched(&self, layers: &[TargetLayer]) -> impl Iterator<Item = Error> {
        let matches = |matcher: &Matcher| layers.iter().any(|layer| matcher.matches(layer));
        let unmatched = self.0.iter().filter(move |(_, matcher)| !matches(matcher));
        unmatched.map(|(entry, _)| Error::NoMatch { pattern: entry.clone(), hint: hint(entry, layers) })
    }
}

/// Numbers for some layers by pattern (PEFT's `rank_pattern` and `alpha_pattern`): a name, a glob or a `re:` expression
/// each. Of several patterns that match a layer the longest counts.
#[derive(Debug, Clone, Default)]
pub struct Patterns(Vec<(String, Matcher, f64)>);

impl Patterns {
    /// Checks the patterns, each of which must match one of the layers.
    ///
    /// # Errors
    /// [`Error::Pattern`] for a malformed pattern; [`Error::NoMatch`] for one that matches no layer, with near names.
    pub fn parse(entries: &BTreeMap<String, f64>, layers: &[TargetLayer]) -> Result<Self> {
        let mut patterns = Vec::with_capacity(entries.len());
        for (entry, &number) in entries {
            let matcher = Matcher::parse(entry)?;
            if !layers.iter().any(|layer| matcher.matches(layer)) {
                return Err(Error::NoMatch { pattern: entry.clone(), hint: hint(entry, layers) });
            }
            patterns.push((entry.clone(), matcher, number));
        }
        patterns.sort_by_key(|(entry, ..)| std::cmp::Reverse(entry.len()));
        Ok(Self(patterns))
    }

    /// The number for a layer.
    pub fn get(&self, layer: &TargetLayer) -> Option<f64> {
        self.0.iter().find(|(_, matcher, _)| matcher.matches(layer)).map(|(.., number)| *number)
    }
}

impl Matcher {
    fn parse(entry: &str) -> Result<Self> {
        let malformed = |reason: String| Error::Pattern { pattern: entry.to_owned(), reason };
        let anchored = |body: &str| Regex::new(&format!("^(?:{body})$")).map_err(|error| malformed(error.to_string()));
        Ok(match entry {
            "attention" => Matcher::Attention,
            "attention-mlp" => Matcher::AttentionMlp,
            "all-linear" => Matcher::AllLinear,
            "all-conv" => Matcher::AllConv,
            _ => {
                if let Some(expression) = entry.strip_prefix("re:") {
                    Matcher::Pattern(anchored(expression)?)
                } else if entry.contains(['*', '?', '[', '{']) {
                    let glob = Glob::new(entry).map_err(|error| malformed(error.kind().to_string()))?;
                    // globset's own regex is meant for byte strings and switches Unicode off; paths are ASCII.
                    Matcher::Pattern(
                        Regex::new(&glob.regex().replace("(?-u)", "")).map_err(|error| malformed(error.to_string()))?,
                    )
                } else {
                    let ends = SYNONYMS.iter().find(|(name, _)| *name == entry);
                    Matcher::Ends(ends.map_or_else(
                        || vec![entry.to_owned()],
                        |(_, ends)| ends.iter().map(|&end| end.to_owned()).collect(),
                    ))
                }
            }
        })
    }

    fn matches(&self, layer: &TargetLayer) -> bool {
        let path = layer.path.path.as_str();
        let unet = layer.path.component == Component::UNET;
        // sd-scripts' rule: in the U-Net all linear layers and 1×1 convolutions inside the transformers; in the text
        // encoder attention and feed-forward. Of a network that is a transformer, the same of its blocks: what refines
        // captions or pictures before them and what modulates is left alone, as musubi-tuner and diffusers do.
        let in_transformer = match layer.path.component {
            Component::UNET => path.contains("attentions."),
            Component::TRANSFORMER => BLOCKS.iter().any(|start| path.starts_with(start)) && !is_modulation(path),
            _ => path.contains(".layers."),
        };
        match self {
            Matcher::Attention => in_transformer && ATTENTION.iter().any(|end| ends_with(path, end)),
            Matcher::AttentionMlp => in_transformer && !layer.geometry.is_spatial(),
            Matcher::AllLinear => matches!(layer.geometry, LayerGeometry::Linear { .. }) && !ends_with(path, "lm_head"),
            Matcher::AllConv => {
                let in_block = ["resnets.", "downsamplers.", "upsamplers."].iter().any(|part| path.contains(part));
                in_transformer && !layer.geometry.is_spatial() || unet && in_block
            }
            Matcher::Ends(ends) => ends.iter().any(|end| ends_with(path, end) || *end == layer.path.to_string()),
            Matcher::Pattern(regex) => regex.is_match(path) || regex.is_match(&layer.path.to_string()),
        }
    }
}

/// Whether `path` is `end` or ends with it after a dot.
fn ends_with(path: &str, end: &str) -> bool {
    path.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Advice for an entry that matched nothing: the nearest layer names, or all of them.
fn hint(entry: &str, layers: &[TargetLayer]) -> String {
    let mut names: BTreeSet<String> = layers.iter().map(|layer| short_name(&layer.path.path)).collect();
    names.extend(PRESETS.iter().map(|&preset| preset.to_owned()));
    let mut near: Vec<_> =
        names.iter().map(|name| (strsim::jaro_winkler(entry, name), name)).filter(|(score, _)| *score > 0.8).collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0));
    if near.is_empty() {
        format!("its layers end in {}", names.into_iter().collect::<Vec<_>>().join(", "))
    } else {
        let near: Vec<_> = near.into_iter().take(3).map(|(_, name)| format!("`{name}`")).collect();
        format!("did you mean {}?", near.join(" or "))
    }
}

/// The end of a path that names a layer's role: its last segment, with those before it while it is a number.
fn short_name(path: &str) -> String {
    let segments: Vec<_> = path.split('.').collect();
    let start = segments.iter().rposition(|segment| segment.parse::<u32>().is_err()).unwrap_or(0);
    segments[start..].join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers() -> Vec<TargetLayer> {
        let unet = |path: &str, geometry| TargetLayer { path: ModulePath::new(Component::UNET, path), geometry };
        let text = |path: &str| TargetLayer {
            path: ModulePath::new(Component::TEXT_ENCODER, format!("text_model.encoder.layers.0.{path}")),
            geometry: LayerGeometry::linear(8, 8),
        };
        let linear = LayerGeometry::linear(8, 8);
        vec![
            unet("conv_in", LayerGeometry::conv2d(4, 8, 3, 1, 1)),
            unet("down_blocks.0.attentions.0.proj_in", LayerGeometry::conv2d(8, 8, 1, 1, 0)),
            unet("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", linear),
            unet("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0", linear),
            unet("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj", linear),
            unet("down_blocks.0.resnets.0.conv1", LayerGeometry::conv2d(8, 8, 3, 1, 1)),
            unet("down_blocks.0.resnets.0.time_emb_proj", linear),
            unet("time_embedding.linear_1", linear),
            text("self_attn.q_proj"),
            text("self_attn.out_proj"),
            text("mlp.fc1"),
        ]
    }

    fn selected(entries: &[&str]) -> Vec<String> {
        let found = Targets::parse(entries).unwrap().select(&layers()).unwrap();
        found.iter().map(|layer| short_name(&layer.path.path)).collect()
    }

    #[test]
    fn names_mean_both_networks() {
        assert_eq!(selected(&["q_proj"]), ["to_q", "q_proj"]);
        assert_eq!(selected(&["out_proj", "q_proj"]), ["to_q", "to_out.0", "q_proj", "out_proj"]);
        assert_eq!(selected(&["to_q"]), ["to_q"]);
        assert_eq!(selected(&["attn1.to_q"]), ["to_q"]);
    }

    #[test]
    fn presets_follow_the_field() {
        assert_eq!(selected(&["attention"]), ["to_q", "to_out.0", "q_proj", "out_proj"]);
        assert_eq!(selected(&["attention-mlp"]), ["proj_in", "to_q", "to_out.0", "proj", "q_proj", "out_proj", "fc1"]);
        assert_eq!(selected(&["all-conv"]).len(), 9);
    }

    #[test]
    fn presets_take_the_blocks_of_a_transformer_without_modulation() {
        let layer = |path: &str| TargetLayer {
            path: ModulePath::new(Component::TRANSFORMER, path),
            geometry: LayerGeometry::linear(8, 8),
        };
        let layers: Vec<_> = [
            "all_x_embedder.2-1",
            "t_embedder.mlp.0",
            "context_refiner.0.attention.to_q",
            "layers.0.adaLN_modulation.0",
            "layers.0.attention.to_q",
            "layers.0.attention.to_out.0",
            "layers.0.feed_forward.w1",
            "transformer_blocks.0.norm1.linear",
            "transformer_blocks.0.attn.add_k_proj",
            "transformer_blocks.0.img_mod.1",
            "single_transformer_blocks.3.proj_mlp",
        ]
        .map(layer)
        .into();
        let selected = |preset: &str| -> Vec<String> {
            let found = Targets::parse(&[preset]).unwrap().select(&layers).unwrap();
            found.iter().map(|layer| short_name(&layer.path.path)).collect()
        };
        assert_eq!(selected("attention"), ["to_q", "to_out.0", "add_k_proj"]);
        assert_eq!(selected("attention-mlp"), ["to_q", "to_out.0", "w1", "add_k_proj", "proj_mlp"]);
        assert_eq!(selected("all-linear").len(), layers.len());
    }

    #[test]
    fn globs_and_expressions_match_whole_paths() {
        assert_eq!(selected(&["unet.*.attn1.*"]), ["to_q", "to_out.0"]);
        assert_eq!(selected(&["*.{to_q,q_proj}"]), ["to_q", "q_proj"]);
        assert_eq!(selected(&[r"re:.*resnets\.\d+\.conv1"]), ["conv1"]);
        assert_eq!(selected(&["unet.conv_in"]), ["conv_in"]);
    }

    #[test]
    fn a_target_that_matches_nothing_is_an_error_with_near_names() {
        let error = |entries: &[&str]| {
            Targets::parse(entries).and_then(|targets| targets.select(&layers())).unwrap_err().to_string()
        };
        assert!(error(&["q_porj"]).contains("did you mean `q_proj`"), "{}", error(&["q_porj"]));
        assert!(error(&["to_q", "xyz"]).contains("`xyz`"));
        assert!(error(&["re:("]).contains("re:("));
        assert!(error(&["a[b"]).contains("a[b"));
        assert!(error(&[]).contains("attention"));
        // Anchored: a part of a path is not enough.
        assert!(error(&["re:attn1"]).contains("matches no layer"));
    }
}
