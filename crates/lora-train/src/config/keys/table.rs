//! All keys that a configuration may have: how they are found, read in their order, told in the reference, and advised on.

use std::fmt;

use super::{Group, Key, Reads, adapter, data, memory, optimisation, pictures, saving};
use crate::base::Bases;
use crate::config::datasets::DatasetValues;
use crate::config::read::{Reader, near};
use crate::config::{TrainConfig, TrainMode};
use crate::{Error, Result};

/// Keys that every base has, and those of [`pictures::KEYS`], in the order of the reference. A key's default may depend on
/// one before it.
static GENERAL: [&Group; 9] = [
    &data::KEYS,
    &data::PICTURES,
    &adapter::KEYS,
    &optimisation::KEYS,
    &pictures::TREATMENT,
    &memory::KEYS,
    &memory::PICTURES,
    &saving::KEYS,
    &saving::PICTURES,
];

/// Keys of other trainers, and what they are called here.
pub(super) const FOREIGN: &[(&str, &str)] = &[
    ("network_dim", "lora_rank"),
    ("network_alpha", "lora_alpha"),
    ("network_dropout", "lora_dropout"),
    ("algo", "variant"),
    ("network_algo", "variant"),
    ("network_weights", "init_from"),
    ("base_weights", "fuse_adapters"),
    ("r", "lora_rank"),
    ("rank", "lora_rank"),
    ("alpha", "lora_alpha"),
    ("pretrained_model_name_or_path", "base_model"),
    ("model_name_or_path", "base_model"),
    ("instance_data_dir", "train_data_dir"),
    ("image_dir", "train_data_dir"),
    ("class_data_dir", "reg_data_dir"),
    ("in_json", "metadata_file"),
    ("flip_aug", "processors"),
    ("color_aug", "processors"),
    ("random_crop", "processors"),
    ("mask_path", "mask_dir"),
    ("conditioning_data_dir", "mask_dir"),
    ("data_dir", "train_data_dir"),
    ("train_batch_size", "batch_size"),
    ("per_device_train_batch_size", "batch_size"),
    ("resolution", "max_resolution"),
    ("mixed_precision", "precision"),
    ("max_train_epochs", "epochs"),
    ("num_train_epochs", "epochs"),
    ("num_epochs", "epochs"),
    ("num_repeats", "repeats"),
    ("lr", "learning_rate"),
    ("optimizer_type", "optimizer"),
    ("lr_scheduler_type", "lr_scheduler"),
    ("warmup_steps", "lr_warmup_steps"),
    ("adam_beta1", "adam_betas"),
    ("adam_beta2", "adam_betas"),
    ("adam_epsilon", "adam_eps"),
    ("adam_weight_decay", "weight_decay"),
    ("max_steps", "max_train_steps"),
    ("snr_gamma", "min_snr_gamma"),
    ("network_train_unet_only", "train_text_encoder"),
    ("network_train_text_encoder_only", "train_unet"),
    ("validation_prompt", "sample_prompts"),
    ("checkpointing_steps", "save_every_n_steps"),
    ("resume_from_checkpoint", "resume"),
    ("report_to", "log_with"),
    ("save_state_on_train_end", "save_state"),
    ("save_n_steps", "save_every_n_steps"),
    ("val_set_size", "validation_split"),
    ("early_stopping", "early_stopping_patience"),
    ("load_best_model_at_end", "save_best"),
    ("save_last_n_steps", "save_total_limit"),
    ("save_last_n_epochs", "save_total_limit"),
    ("rl", "objective"),
    ("rl_beta", "dpo_beta"),
    ("pref_beta", "dpo_beta"),
    ("beta", "dpo_beta"),
    ("orpo_alpha", "orpo_lambda"),
];

/// The keys that a configuration may have: the general ones, those of the bases of this crate, and what a program registers.
///
/// ```
/// use lora_train::Plugins;
/// use lora_train::config::keys::{Group, Key, Reads, Resumed, Setting};
/// use lora_train::config::{Format, TrainConfig};
///
/// static OF_FLOW: &[&Group] = &[&Group {
///     section: "Flow",
///     behind: None,
///     keys: &[Key {
///         name: "flow_shift",
///         values: "above 0",
///         default: "3.0",
///         meaning: "Shifts times towards noise.",
///         memory: "",
///         resumed: Resumed::Fixed(|config| config.extra.shown("flow_shift")),
///         reads: Reads::Extra(|given| Setting::Number(given.positive().unwrap_or(3.0))),
///     }],
/// }];
/// let mut plugins = Plugins::default();
/// plugins.keys.register(OF_FLOW)?;
/// let text = "base_model: b\ntrain_data_dir: d\noutput_dir: o\n";
/// let config = TrainConfig::from_text_with(text, Format::Yaml, &["flow_shift=2.5"], &plugins)?;
/// assert_eq!(config.extra.number("flow_shift"), Some(2.5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Keys(Vec<&'static Group>);

impl Default for Keys {
    fn default() -> Self {
        let mut keys = Self(GENERAL.to_vec());
        for group in Bases::default().groups() {
            if !keys.has(group) {
                keys.0.push(group);
            }
        }
        keys
    }
}

impl Keys {
    /// Adds keys. Groups that are there already, as where two bases share them, stay as they are.
    ///
    /// # Errors
    /// [`Error::DuplicateKey`] where another key has one of their names.
    pub fn register(&mut self, groups: &'static [&'static Group]) -> Result<()> {
        for group in groups {
            if self.has(group) {
                continue;
            }
            if let Some(key) = group.keys.iter().find(|key| self.get(key.name).is_some()) {
                return Err(Error::DuplicateKey { name: key.name.to_owned() });
            }
            self.0.push(group);
        }
        Ok(())
    }

    fn has(&self, group: &Group) -> bool {
        among(&self.0, group)
    }

    /// All keys, in the order in which they are read: those that are registered last come last.
    pub fn iter(&self) -> impl Iterator<Item = &'static Key> + '_ {
        self.0.iter().flat_map(|group| group.keys)
    }

    /// The key of a name.
    pub fn get(&self, name: &str) -> Option<&'static Key> {
        self.iter().find(|key| key.name == name)
    }

    /// Names of all keys.
    pub fn names(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.iter().map(|key| key.name)
    }

    /// Names of the keys that each dataset may have of its own.
    pub(in crate::config) fn of_datasets(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.iter().filter(|key| matches!(key.reads, Reads::Dataset(_) | Reads::Both(..))).map(|key| key.name)
    }

    /// Names of the keys that bases and their data bring, but for those of these groups.
    pub(in crate::config) fn of_other_bases(&self, own: &[&Group]) -> impl Iterator<Item = &'static str> {
        let general = |group: &Group| among(&GENERAL, group) && !among(pictures::KEYS, group);
        let groups = self.0.iter().filter(move |group| !general(group) && !among(own, group));
        groups.flat_map(|group| group.keys).map(|key| key.name)
    }

    /// Reads every key of the run, but for the datasets.
    pub(in crate::config) fn read(&self, reader: &mut Reader, config: &mut TrainConfig) {
        for key in self.iter() {
            let given = &mut reader.given(key.name);
            match key.reads {
                Reads::Extra(read) => config.extra.insert(key.name, read(given)),
                reads => reads.run().into_iter().for_each(|read| read(given, config)),
            }
        }
        if config.train == TrainMode::Full {
            for key in self.iter().filter(|key| matches!(key.reads, Reads::Adapter(_))) {
                let given = &mut reader.given(key.name);
                if given.has(key.name) {
                    given.problem("means nothing with train = full; take it out, or train = lora");
                }
            }
        }
    }

    /// Reads every key of a dataset.
    pub(in crate::config) fn read_dataset(&self, reader: &mut Reader, values: &mut DatasetValues) {
        for key in self.iter() {
            key.reads.dataset().into_iter().for_each(|read| read(&mut reader.given(key.name), values));
        }
    }

    /// What is said of an unknown key.
    pub(in crate::config) fn advice(&self, key: &str) -> String {
        if let Some((_, ours)) = FOREIGN.iter().find(|(theirs, _)| *theirs == key) {
            return format!("unknown key; here it is called `{ours}`");
        }
        format!("unknown key{}", near(key, self.names()))
    }

    /// Sections with their keys, in the order of the reference.
    fn sections(&self) -> Vec<(&'static str, Vec<&'static Key>)> {
        let mut sections: Vec<(&str, Vec<&Key>)> = Vec::new();
        for group in &self.0 {
            let place = sections.iter().position(|(title, _)| *title == group.section).unwrap_or_else(|| {
                sections.push((group.section, Vec::new()));
                sections.len() - 1
            });
            let keys = &mut sections[place].1;
            let behind = keys.iter().position(|key| Some(key.name) == group.behind);
            let at = behind.map_or(keys.len(), |before| before + 1);
            keys.splice(at..at, group.keys);
        }
        sections
    }

    /// The reference as Markdown.
    pub fn reference(&self) -> String {
        let mut text = String::from(
            "# Configuration\n\n\
             One file in TOML or YAML, with the same flat keys. Paths are relative to the current directory. Any key can be\n\
             set from the command line: `lora train config.toml --set lora_rank=8`. An unknown key is an error that names the\n\
             nearest one, and every value is checked before a model is loaded.\n\n\
             This page is made from the program's own table of keys.\n",
        );
        for (section, keys) in self.sections() {
            text.push_str(&format!(
                "\n## {section}\n\n| key | values | default | what it does | video memory |\n|---|---|---|---|---|\n"
            ));
            for Key { name, values, default, meaning, memory, .. } in keys {
                let default = default.replace('|', "\\|");
                text.push_str(&format!("| `{name}` | {values} | {default} | {meaning} | {memory} |\n"));
            }
        }
        text
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}

/// Whether a group is one of these.
fn among(groups: &[&Group], one: &Group) -> bool {
    groups.iter().any(|group| std::ptr::eq(*group, one))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::Plugins;
    use crate::config::Format;
    use crate::config::keys::{Resumed, Setting, language, stable_diffusion};

    fn read(text: &str, plugins: &Plugins) -> std::result::Result<TrainConfig, String> {
        let text = format!("base_model = \"b\"\ntrain_data_dir = \"d\"\noutput_dir = \"o\"\n{text}");
        TrainConfig::from_text_with::<&str>(&text, Format::Toml, &[], plugins).map_err(|error| error.to_string())
    }

    #[test]
    fn every_field_has_a_key_of_its_name_and_no_two_keys_share_one() {
        let keys = Keys::default();
        let names: BTreeSet<&str> = keys.names().collect();
        assert_eq!(names.len(), keys.iter().count());
        // These are said by several keys, or by one of a longer name.
        let made: Vec<&&str> = TrainConfig::FIELDS.iter().filter(|field| !names.contains(**field)).collect();
        assert_eq!(made, [&"lr_warmup", &"length", &"samples"]);
        for (theirs, ours) in FOREIGN {
            assert!(names.contains(ours) && !names.contains(theirs), "{theirs}, {ours}");
        }
    }

    #[test]
    fn a_default_is_what_the_reference_says() {
        let plugins = Plugins::default();
        // All but which keys were given.
        let shown = |config: &TrainConfig| format!("{config:?}").split(", keys: (").next().unwrap().to_owned();
        let without = shown(&read("", &plugins).unwrap());
        let mut checked = 0;
        for key in Keys::default().iter() {
            let line = format!("{} = {}", key.name, key.default);
            // Others are told in words.
            if toml::from_str::<toml::Table>(&line).is_ok() && key.name != "save_state" {
                assert_eq!(shown(&read(&line, &plugins).expect(&line)), without, "{line}");
                checked += 1;
            }
        }
        assert!(checked > 50, "{checked}");
    }

    #[test]
    fn groups_stand_behind_keys_that_there_are() {
        let keys = Keys::default();
        for group in &keys.0 {
            let section = keys.0.iter().filter(|other| other.section == group.section);
            let mut before = section.flat_map(|other| other.keys).map(|key| key.name);
            assert!(group.behind.is_none_or(|name| before.any(|known| known == name)), "{group:?}");
        }
    }

    #[test]
    fn a_language_model_refuses_keys_of_pictures_wherever_they_stand() {
        let own = [crate::base::TEXTS.keys, language::KEYS].concat();
        let others = |text: &str| read(text, &Plugins::default()).unwrap().keys_of_other_bases(&own);
        for line in [
            "max_resolution = 512",
            "reg_data_dir = \"r\"",
            "prior_loss_weight = 0.5",
            "loss_weight = 0.5",
            "caption_extension = \".cap\"",
            "shuffle_caption = true",
            "sample_negative_prompt = \"x\"",
            "sample_steps = 10",
            "sample_guidance_scale = 4",
            "sample_resolution = 256",
            "sample_sampler = \"ddim\"",
            "allow_lower_resolution = true",
            "clip_skip = 2",
        ] {
            assert_eq!(others(line), [line.split(' ').next().unwrap()]);
        }
        assert!(others("repeats = 2\nsample_seed = 1\nmax_seq_length = 64\ngradient_checkpointing = true").is_empty());
        let text = "base_model = \"b\"\noutput_dir = \"o\"\n[[datasets]]\ntrain_data_dir = \"d\"\nenable_bucket = true";
        let config = TrainConfig::from_text::<&str>(text, Format::Toml, &[]).unwrap();
        assert_eq!(config.keys_of_other_bases(&own), ["enable_bucket"]);
    }

    static OF_A_USER: &[&Group] = &[&Group {
        section: "Flow",
        behind: None,
        keys: &[
            Key {
                name: "flow_shift",
                values: "above 0",
                default: "3.0",
                meaning: "Shifts times towards noise.",
                memory: "",
                resumed: Resumed::Fixed(|config| config.extra.shown("flow_shift")),
                reads: Reads::Extra(|given| Setting::Number(given.positive().unwrap_or(3.0))),
            },
            Key {
                name: "flow_note",
                values: "text",
                default: "none",
                meaning: "A note.",
                memory: "",
                resumed: Resumed::Unrecorded,
                reads: Reads::Extra(|given| given.text().map_or(Setting::Nothing, Setting::Text)),
            },
        ],
    }];

    #[test]
    fn keys_of_a_user_are_read_documented_and_advised_on_as_any() {
        let mut plugins = Plugins::default();
        plugins.keys.register(OF_A_USER).unwrap();
        plugins.keys.register(OF_A_USER).expect("two bases may share keys");
        let config = read("flow_shift = 2.5", &plugins).unwrap();
        assert_eq!((config.extra.number("flow_shift"), config.extra.text("flow_note")), (Some(2.5), None));
        assert_eq!(config.extra.shown("flow_note"), "none");
        assert_eq!(read("", &plugins).unwrap().extra.number("flow_shift"), Some(3.0));
        let error = read("flow_shfit = 2", &plugins).unwrap_err();
        assert!(error.contains("did you mean `flow_shift`"), "{error}");
        let error = read("flow_shift = -1", &plugins).unwrap_err();
        assert!(error.contains(":4: `flow_shift`: expected a number above 0, found -1"), "{error}");
        let end = "\n## Flow\n\n| key | values | default | what it does | video memory |\n|---|---|---|---|---|\n\
                   | `flow_shift` | above 0 | 3.0 | Shifts times towards noise. |  |\n\
                   | `flow_note` | text | none | A note. |  |\n";
        assert_eq!(plugins.keys.reference(), Keys::default().reference() + end);
        assert!(read("flow_shift = 2.5", &Plugins::default()).unwrap_err().contains("unknown key"));

        let config = read("flow_shift = 2.5\nclip_skip = 2\nseed = 1", &plugins).unwrap();
        assert_eq!(config.keys_of_other_bases(OF_A_USER), ["clip_skip"]);
        assert_eq!(config.keys_of_other_bases(stable_diffusion::KEYS), ["flow_shift"]);

        static TAKEN: &[&Group] = &[&Group { section: "Mine", behind: None, keys: adapter::KEYS.keys }];
        assert!(plugins.keys.register(TAKEN).unwrap_err().to_string().contains("`train`"));
    }

    #[test]
    fn an_optimiser_of_a_user_has_its_own_usual_learning_rate() {
        let mut plugins = Plugins::default();
        let make = |settings: &mut crate::optimiser::Settings| -> Box<dyn crate::optimiser::Optimiser> {
            Box::new(crate::optimiser::Lion::new(settings))
        };
        plugins.optimisers.register_with_rate("mine", 0.5, make).unwrap();
        let rate = |text: &str| read(text, &plugins).unwrap().learning_rate;
        assert_eq!(rate("optimizer = \"mine\""), 0.5);
        assert_eq!(rate("optimizer = \"mine\"\nlearning_rate = 0.25"), 0.25);
        assert_eq!((rate(""), rate("optimizer = \"lion\"")), (1e-4, 3e-5));
    }
}
