//! Optimisers by name.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::{
    Adafactor, AdamW, AdamW8bit, Arguments, Came, Lion, Muon, Optimiser, Prodigy, ScheduleFreeAdamW, Settings,
    StableAdamW,
};
use crate::{Error, Result};

type Make = Arc<dyn Fn(&mut Settings) -> Box<dyn Optimiser> + Send + Sync>;

const USUAL_LEARNING_RATE: f64 = 1e-4;

/// What stands under a name.
#[derive(Clone)]
struct Registered {
    /// As it is written here.
    name: String,
    /// As files name it.
    class: String,
    learning_rate: f64,
    make: Make,
}

/// Optimisers by name. Names are matched as people write them elsewhere: `AdamW8bit`, `adamw_8bit` and
/// `bitsandbytes.optim.AdamW8bit` are one.
#[derive(Clone)]
pub struct OptimiserRegistry(BTreeMap<String, Registered>);

/// An optimiser made from a configuration.
#[derive(Debug)]
#[non_exhaustive]
pub struct Chosen {
    /// The optimiser.
    pub optimiser: Box<dyn Optimiser>,
    /// Its class and numbers, as files record them: `torch.optim.adamw.AdamW(weight_decay=0.01)`.
    pub record: String,
}

impl Default for OptimiserRegistry {
    /// The optimisers of this crate. The class that files name is the one of the same formula that sd-scripts uses.
    fn default() -> Self {
        let mut registry = Self(BTreeMap::new());
        let mut add = |name: &str, class: &str, learning_rate, make: fn(&mut Settings) -> Box<dyn Optimiser>| {
            registry.insert(Registered { name: name.into(), class: class.into(), learning_rate, make: Arc::new(make) });
        };
        add("adamw", "torch.optim.adamw.AdamW", USUAL_LEARNING_RATE, |s| Box::new(AdamW::new(s)));
        add("adamw8bit", "bitsandbytes.optim.adamw.AdamW8bit", USUAL_LEARNING_RATE, |s| Box::new(AdamW8bit::new(s)));
        add("adafactor", "transformers.optimization.Adafactor", USUAL_LEARNING_RATE, |s| Box::new(Adafactor::new(s)));
        add("lion", "lion_pytorch.lion_pytorch.Lion", 3e-5, |s| Box::new(Lion::new(s)));
        add("prodigy", "prodigyopt.prodigy.Prodigy", 1.0, |s| Box::new(Prodigy::new(s)));
        add("adamw_schedulefree", "schedulefree.adamw_schedulefree.AdamWScheduleFree", USUAL_LEARNING_RATE, |s| {
            Box::new(ScheduleFreeAdamW::new(s))
        });
        add("came", "came_pytorch.CAME.CAME", USUAL_LEARNING_RATE, |s| Box::new(Came::new(s)));
        add("muon", "torch.optim._muon.Muon", USUAL_LEARNING_RATE, |s| Box::new(Muon::new(s)));
        add("stable_adamw", "pytorch_optimizer.optimizer.adamw.StableAdamW", USUAL_LEARNING_RATE, |s| {
            Box::new(StableAdamW::new(s))
        });
        registry
    }
}

impl OptimiserRegistry {
    /// Adds an optimiser under a name, which must be free.
    ///
    /// # Errors
    /// [`Error::DuplicateOptimiser`] where it is not.
    pub fn register(
        &mut self,
        name: &str,
        make: impl Fn(&mut Settings) -> Box<dyn Optimiser> + Send + Sync + 'static,
    ) -> Result<()> {
        self.register_with_rate(name, USUAL_LEARNING_RATE, make)
    }

    /// As [`OptimiserRegistry::register`], with the learning rate where a configuration gives none.
    ///
    /// # Errors
    /// [`Error::DuplicateOptimiser`] where the name is taken.
    pub fn register_with_rate(
        &mut self,
        name: &str,
        learning_rate: f64,
        make: impl Fn(&mut Settings) -> Box<dyn Optimiser> + Send + Sync + 'static,
    ) -> Result<()> {
        if self.0.contains_key(&plain(name)) {
            return Err(Error::DuplicateOptimiser { name: name.to_owned() });
        }
        self.insert(Registered { name: name.into(), class: name.into(), learning_rate, make: Arc::new(make) });
        Ok(())
    }

    fn insert(&mut self, registered: Registered) {
        self.0.insert(plain(&registered.name), registered);
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.values().map(|registered| registered.name.as_str())
    }

    /// The name as it is written here, of one that is written as elsewhere; as it is where there is no such optimiser.
    pub(crate) fn canonical(&self, name: &str) -> String {
        self.0.get(&plain(name)).map_or_else(|| name.to_owned(), |registered| registered.name.clone())
    }

    /// The learning rate of an optimiser where a configuration gives none: 1e-4 where there is no such optimiser, too.
    pub(crate) fn usual_learning_rate(&self, name: &str) -> f64 {
        self.0.get(&plain(name)).map_or(USUAL_LEARNING_RATE, |registered| registered.learning_rate)
    }

    /// Makes the optimiser of a name from its own numbers.
    ///
    /// # Errors
    /// [`Error::UnknownOptimiser`] with the known names and the nearest one; [`Error::OptimiserArgument`] for an
    /// argument that it does not have or a value that is impossible.
    pub fn make(&self, name: &str, learning_rate: f64, arguments: &Arguments) -> Result<Chosen> {
        let Some(registered) = self.0.get(&plain(name)) else {
            let scored = self.names().map(|known| (strsim::jaro_winkler(&plain(name), &plain(known)), known));
            let near = scored.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(score, _)| *score > 0.8);
            return Err(Error::UnknownOptimiser {
                name: name.to_owned(),
                known: self.names().collect::<Vec<_>>().join(", "),
                near: near.map_or_else(String::new, |(_, near)| format!("; did you mean `{near}`?")),
            });
        };
        let mut settings = Settings::new(&registered.name, learning_rate, arguments);
        let optimiser = (registered.make)(&mut settings);
        let numbers = settings.finish()?;
        Ok(Chosen { optimiser, record: format!("{}({numbers})", registered.class) })
    }
}

impl fmt::Debug for OptimiserRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}

/// A name without its path, in lower case, without `-` and `_`.
fn plain(name: &str) -> String {
    let last = name.rsplit('.').next().unwrap_or_default();
    last.chars().filter(|c| !matches!(c, '-' | '_')).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(list: &[(&str, &[f64])]) -> Arguments {
        list.iter().map(|(name, values)| ((*name).to_owned(), values.to_vec())).collect()
    }

    #[test]
    fn names_are_known_as_others_write_them() {
        let registry = OptimiserRegistry::default();
        for (theirs, ours) in [
            ("AdamW", "adamw"),
            ("torch.optim.AdamW", "adamw"),
            ("AdamW8bit", "adamw8bit"),
            ("adamw_8bit", "adamw8bit"),
            ("AdaFactor", "adafactor"),
            ("Lion", "lion"),
            ("came_pytorch.CAME", "came"),
            ("torch.optim.Muon", "muon"),
            ("StableAdamW", "stable_adamw"),
            ("prodigyopt.Prodigy", "prodigy"),
            ("AdamWScheduleFree", "adamw_schedulefree"),
            ("schedulefree.AdamWScheduleFree", "adamw_schedulefree"),
        ] {
            let record = |name| registry.make(name, 1e-4, &Arguments::new()).unwrap().record;
            assert_eq!(record(theirs), record(ours));
        }
        let error = registry.make("AdamW8bits", 1.0, &Arguments::new()).unwrap_err().to_string();
        assert!(error.contains("adafactor, adamw, adamw8bit") && error.contains("did you mean `adamw8bit`"), "{error}");
    }

    #[test]
    fn records_are_written_as_sd_scripts_writes_them() {
        let registry = OptimiserRegistry::default();
        let record = |name, list| registry.make(name, 1e-4, &arguments(list)).unwrap().record;
        let expected = "torch.optim.adamw.AdamW(betas=(0.9, 0.99),eps=1e-08,weight_decay=0.1)";
        assert_eq!(record("adamw", &[("betas", &[0.9, 0.99]), ("weight_decay", &[0.1])]), expected);
        let expected = "transformers.optimization.Adafactor(relative_step=False,warmup_init=False,eps=(1e-30, 0.001),\
                        clip_threshold=1.0,decay_rate=-0.8,weight_decay=0.0,scale_parameter=True)";
        assert_eq!(record("adafactor", &[("relative_step", &[0.0])]), expected);
        assert!(record("prodigy", &[("d_coef", &[2.0])]).contains("d_coef=2.0,growth_rate=float('inf'),slice_p=1.0"));
    }

    #[test]
    fn wrong_numbers_are_named() {
        let registry = OptimiserRegistry::default();
        for (name, list, fragments) in [
            (
                "prodigy",
                ("d_coeff", &[2.0] as &[f64]),
                &["prodigy", "d_coeff", "d_coef, growth_rate", "mean `d_coef`"] as &[&str],
            ),
            ("prodigy", ("d_coef", &[-1.0]), &["d_coef", "above 0", "-1"]),
            ("prodigy", ("decouple", &[2.0]), &["decouple", "true or false"]),
            ("adamw", ("betas", &[0.9]), &["betas", "two numbers", "0.9"]),
            ("adamw", ("betas", &[0.9, 1.0]), &["below 1"]),
            ("adamw_schedulefree", ("betas", &[0.0, 0.9]), &["above 0"]),
            ("lion", ("eps", &[1e-8]), &["lion", "eps", "betas, weight_decay"]),
            ("adafactor", ("eps", &[1e-8]), &["eps", "two numbers"]),
            ("came", ("betas", &[0.9, 0.999]), &["betas", "three numbers"]),
            ("muon", ("ns_steps", &[0.0]), &["ns_steps", "from 1 to 20"]),
            ("adamw8bit", ("min_8bit_size", &[0.5]), &["min_8bit_size", "whole number"]),
        ] {
            let error = registry.make(name, 1e-4, &arguments(&[list])).unwrap_err();
            for fragment in fragments {
                assert!(error.is_usage() && error.to_string().contains(fragment), "{error} lacks {fragment}");
            }
        }
        let both = arguments(&[("warmup_init", &[1.0]), ("relative_step", &[0.0])]);
        assert!(registry.make("adafactor", 1e-4, &both).unwrap_err().to_string().contains("relative_step = true"));
    }

    #[test]
    fn users_register_their_own() {
        let mut registry = OptimiserRegistry::default();
        registry.register("mine", |settings| Box::new(Lion::new(settings))).unwrap();
        assert_eq!(registry.usual_learning_rate("Mine"), 1e-4);
        assert!(registry.make("mine", 0.5, &Arguments::new()).unwrap().record.starts_with("mine(betas="));
        assert!(registry.register("AdamW", |settings| Box::new(Lion::new(settings))).is_err());
    }
}
