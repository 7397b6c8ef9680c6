//! NVIDIA cards and their driver as the driver's own tool tells them, and which of them a libtorch cannot work with. Neither CUDA nor
//! libtorch is needed to know it.

use std::process::Command;

/// A card.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Card {
    /// Its name.
    pub name: String,
    /// Version of the driver, `580.65.06`.
    pub driver: String,
    /// Compute capability, (8, 9): which generation of cards it is of.
    pub capability: (u32, u32),
}

impl Card {
    /// What its generation is called.
    pub fn generation(&self) -> &'static str {
        match self.capability {
            (5, _) => "Maxwell",
            (6, _) => "Pascal",
            (7, 0..=4) => "Volta",
            (7, _) => "Turing",
            (8, 9) => "Ada",
            (8, _) => "Ampere",
            (9, _) => "Hopper",
            (10.., _) => "Blackwell or later",
            _ => "before Maxwell",
        }
    }
}

/// What libtorch's builds with a major version of CUDA need: its number, the oldest branch of the Linux driver, the lowest compute
/// capability (NVIDIA's release notes of CUDA 12 and 13; the lists of architectures that libtorch 2.11's builds have).
const BUILDS: [(u32, u32, (u32, u32)); 2] = [(12, 525, (5, 0)), (13, 580, (7, 5))];

/// The cards of this machine; none where the driver's tool is not there or fails.
pub fn cards() -> Vec<Card> {
    let query = ["--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"];
    match Command::new("nvidia-smi").args(query).output() {
        Ok(output) if output.status.success() => parse(&String::from_utf8_lossy(&output.stdout)),
        _ => Vec::new(),
    }
}

fn parse(text: &str) -> Vec<Card> {
    let card = |line: &str| {
        // A name may have a comma in it; the other two have none.
        let mut values = line.rsplitn(3, ',').map(str::trim);
        let (capability, driver, name) = (values.next()?, values.next()?, values.next()?);
        let (major, minor) = capability.split_once('.')?;
        let capability = (major.parse().ok()?, minor.parse().ok()?);
        Some(Card { name: name.to_owned(), driver: driver.to_owned(), capability })
    };
    text.lines().filter_map(card).collect()
}

/// What does not go together: a driver too old, or a card too old, for a libtorch built with this major version of CUDA; each with
/// the cure. Nothing is said of versions that are not known here.
pub fn problems(cards: &[Card], cuda: u32) -> Vec<String> {
    let Some(&(_, driver, least)) = BUILDS.iter().find(|(version, ..)| *version == cuda) else { return Vec::new() };
    let mut problems = Vec::new();
    let branch = |card: &Card| card.driver.split('.').next().and_then(|branch| branch.parse::<u32>().ok());
    if let Some(card) = cards.iter().find(|card| branch(card).is_some_and(|branch| branch < driver)) {
        problems.push(format!(
            "the driver is {}, and this libtorch is built with CUDA {cuda}, which needs {driver} or later: install a newer driver",
            card.driver
        ));
    }
    for card in cards.iter().filter(|card| card.capability < least) {
        let (major, minor) = card.capability;
        let older = BUILDS.iter().rev().find(|(_, _, least)| card.capability >= *least);
        let cure = older.map_or_else(
            || "train on the CPU (device = \"cpu\")".to_owned(),
            |(version, ..)| format!("it takes a libtorch of the same version that is built with CUDA {version}"),
        );
        problems.push(format!(
            "{} ({}, compute capability {major}.{minor}) is older than what a libtorch built with CUDA {cuda} computes on, {}.{} or later: {cure}",
            card.name,
            card.generation(),
            least.0,
            least.1
        ));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_read_as_the_drivers_tool_writes_them() {
        let cards =
            parse("NVIDIA H200, 580.65.06, 9.0\nTesla P40, 24 GB, 550.54.15, 6.1\nno card\nNVIDIA X, [N/A], [N/A]\n");
        let told: Vec<_> =
            cards.iter().map(|card| (card.name.as_str(), card.driver.as_str(), card.generation())).collect();
        assert_eq!(told, [("NVIDIA H200", "580.65.06", "Hopper"), ("Tesla P40, 24 GB", "550.54.15", "Pascal")]);
    }

    #[test]
    fn drivers_and_cards_that_do_not_go_with_a_libtorch_are_named_with_the_cure() {
        let card = |driver: &str, capability| Card { name: "Card".into(), driver: driver.into(), capability };
        assert!(problems(&[card("580.65.06", (7, 5)), card("580.65.06", (12, 0))], 13).is_empty());
        assert!(problems(&[card("550.54.15", (6, 1))], 12).is_empty());
        let told = problems(&[card("570.86.15", (8, 9))], 13);
        assert!(told.len() == 1 && told[0].contains("570.86.15") && told[0].contains("580 or later"), "{told:?}");
        let told = problems(&[card("580.65.06", (6, 1))], 13);
        assert!(told.len() == 1 && told[0].contains("Pascal") && told[0].contains("built with CUDA 12"), "{told:?}");
        let told = problems(&[card("390.10", (3, 5))], 13);
        assert!(told.len() == 2 && told[1].contains("device = \"cpu\""), "{told:?}");
        assert!(problems(&[card("390.10", (3, 5))], 99).is_empty());
    }
}
