//! Collecting fates and problems into an opinion: equal problems are counted together, and the verdict follows from them.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::{Consumer, Cure, Effect, Fate, Opinion, Problem, Verdict};

/// Examples kept of a problem's tensors.
const EXAMPLES: usize = 3;

/// An opinion in the making.
#[derive(Debug, Default)]
pub(super) struct OpinionBuilder {
    keys: BTreeMap<String, Fate>,
    problems: Vec<Problem>,
}

impl OpinionBuilder {
    /// This tensor takes effect.
    pub(super) fn load(&mut self, key: &str) {
        self.keys.insert(key.to_owned(), Fate::Loaded);
    }

    /// This tensor takes effect, unless it was refused before.
    pub(super) fn load_unless_refused(&mut self, key: &str) {
        self.keys.entry(key.to_owned()).or_insert(Fate::Loaded);
    }

    /// This tensor has no effect.
    pub(super) fn ignore(
        &mut self,
        key: &str,
        effect: Effect,
        what: impl Into<Cow<'static, str>>,
        cure: impl Into<Option<Cure>>,
    ) {
        let reason = what.into();
        self.problem(effect, Some(key), reason.clone(), cure);
        self.keys.insert(key.to_owned(), Fate::Ignored { reason });
    }

    /// This tensor makes the load fail.
    pub(super) fn refuse(&mut self, key: &str, what: impl Into<Cow<'static, str>>, cure: impl Into<Option<Cure>>) {
        let reason = what.into();
        self.problem(Effect::Fatal, Some(key), reason.clone(), cure);
        self.keys.insert(key.to_owned(), Fate::Refused { reason });
    }

    /// A problem of a tensor whose fate stands elsewhere, or of the config.
    pub(super) fn problem(
        &mut self,
        effect: Effect,
        key: Option<&str>,
        what: impl Into<Cow<'static, str>>,
        cure: impl Into<Option<Cure>>,
    ) {
        let (what, cure) = (what.into(), cure.into());
        let same = |p: &Problem| p.effect == effect && p.what == what && p.cure == cure;
        let index = match self.problems.iter().position(same) {
            Some(index) => index,
            None => {
                self.problems.push(Problem { effect, what, keys: 0, examples: Vec::new(), cure });
                self.problems.len() - 1
            }
        };
        let problem = &mut self.problems[index];
        if let Some(key) = key {
            problem.keys += 1;
            if problem.examples.len() < EXAMPLES {
                problem.examples.push(key.to_owned());
            }
        }
    }

    /// The opinion. Where the load fails, tensors that are not to blame take no effect either.
    pub(super) fn finish(mut self, consumer: Consumer) -> Opinion {
        let worst = self.problems.iter().map(|problem| problem.effect).max();
        if worst == Some(Effect::Fatal) {
            for fate in self.keys.values_mut().filter(|fate| **fate == Fate::Loaded) {
                *fate = Fate::Ignored { reason: Cow::Borrowed("the load as a whole is refused") };
            }
        }
        let loaded = self.keys.values().any(|fate| *fate == Fate::Loaded);
        let verdict = match worst {
            Some(Effect::Fatal) => Verdict::Refuses,
            _ if !loaded => Verdict::NothingLoaded,
            Some(Effect::Wrong) => Verdict::LoadsWrong,
            Some(Effect::Part) => Verdict::LoadsPart,
            Some(Effect::Note) | None => Verdict::Loads,
        };
        self.problems.sort_by(|a, b| b.effect.cmp(&a.effect).then(b.keys.cmp(&a.keys)));
        Opinion { consumer, verdict, keys: self.keys, problems: self.problems }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_problems_are_counted_once_and_the_worst_comes_first() {
        let mut builder = OpinionBuilder::default();
        for key in ["a", "b", "c", "d"] {
            builder.ignore(key, Effect::Part, "not asked for", Cure::ToKohya);
        }
        builder.load("e");
        builder.problem(Effect::Wrong, None, "scale", None);
        let opinion = builder.finish(Consumer::WebUi);
        assert_eq!(opinion.verdict, Verdict::LoadsWrong);
        assert_eq!(opinion.problems[0].what, "scale");
        assert_eq!(opinion.problems[1].keys, 4);
        assert_eq!(opinion.problems[1].examples, ["a", "b", "c"]);
    }

    #[test]
    fn a_refused_load_loads_nothing() {
        let mut builder = OpinionBuilder::default();
        builder.load("a");
        builder.refuse("b", "left over", None);
        let opinion = builder.finish(Consumer::Diffusers);
        assert_eq!(opinion.verdict, Verdict::Refuses);
        assert_eq!(opinion.loaded(), 0);
        assert!(matches!(opinion.keys["b"], Fate::Refused { .. }));
        assert!(matches!(opinion.keys["a"], Fate::Ignored { .. }));
    }

    #[test]
    fn the_verdict_follows_from_the_worst_problem() {
        let verdict = |effect: Option<Effect>, load: bool| {
            let mut builder = OpinionBuilder::default();
            if load {
                builder.load("a");
            }
            if let Some(effect) = effect {
                builder.problem(effect, None, "x", None);
            }
            builder.finish(Consumer::Peft).verdict
        };
        assert_eq!(verdict(None, true), Verdict::Loads);
        assert_eq!(verdict(Some(Effect::Note), true), Verdict::Loads);
        assert_eq!(verdict(Some(Effect::Part), true), Verdict::LoadsPart);
        assert_eq!(verdict(Some(Effect::Wrong), false), Verdict::NothingLoaded);
        assert_eq!(verdict(None, false), Verdict::NothingLoaded);
    }
}
