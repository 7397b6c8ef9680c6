//! Trees that are lists: networks of numbered blocks whose two trees differ by name, and in what lies in one tensor.

use super::{Depths, Piece, Share, Tree, numbered as split_number};

/// The names of a transformer in single files, both ways. Of single files some are repacked and stand behind a prefix, and
/// some have the canonical names, saved by themselves: all are taken.
#[derive(Debug)]
pub struct Table {
    /// Its modules. A name may have one number, which is `#` here.
    pub modules: &'static [Module],
    /// Tensors that are no module's: original name, canonical name.
    pub tensors: &'static [(&'static str, &'static str)],
    /// How the canonical names of its blocks begin: how many there are decides about [`Order::SwappedInLast`].
    pub blocks: &'static str,
}

/// A module of the original tree.
#[derive(Debug)]
pub struct Module {
    original: &'static str,
    /// The canonical modules that it is made of, in the order of their rows, each with how many parts of these it has.
    canonical: &'static [(&'static str, usize)],
    order: Order,
    /// What its weight is called.
    weight: &'static str,
}

/// How the rows of an original module lie to those of the canonical one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// In the same order.
    Same,
    /// With halves exchanged: shift and scale in the original tree, scale and shift in the canonical one.
    Swapped,
    /// The same in the last block alone.
    SwappedInLast,
}

/// What tensors stand behind in files that hold other parts too, or once did.
pub(super) const PREFIXES: &[&str] = &["model.diffusion_model.", "diffusion_model.", "model.", "net."];

impl Module {
    /// Of one canonical module, of another name.
    pub(super) const fn new(original: &'static str, canonical: &'static [(&'static str, usize); 1]) -> Self {
        Self { original, canonical, order: Order::Same, weight: "weight" }
    }

    /// Of several.
    pub(super) const fn fused(original: &'static str, canonical: &'static [(&'static str, usize)]) -> Self {
        Self { original, canonical, order: Order::Same, weight: "weight" }
    }

    /// The same with rows in another order.
    pub(super) const fn in_order(self, order: Order) -> Self {
        Self { order, ..self }
    }

    /// The same whose weight the original tree calls otherwise.
    pub(super) const fn with_weight(self, weight: &'static str) -> Self {
        Self { weight, ..self }
    }

    /// What of its tensor a canonical module is.
    fn piece(&self, index: usize, block: Option<usize>, depths: &Depths) -> Piece {
        let is_last = || block.is_some_and(|block| block + 1 == depths.layers);
        match self.order {
            Order::Swapped => return Piece::Swapped,
            Order::SwappedInLast if is_last() => return Piece::Swapped,
            _ => {}
        }
        if self.canonical.len() == 1 {
            return Piece::All;
        }
        let parts = |modules: &[(&str, usize)]| modules.iter().map(|(_, parts)| parts).sum();
        let (first, of) = (parts(&self.canonical[..index]), parts(self.canonical));
        Piece::Rows(Share { first, count: self.canonical[index].1, of })
    }
}

/// The number of a name that is of a pattern, where that has one.
fn matched(pattern: &str, name: &str) -> Option<Option<usize>> {
    match pattern.split_once('#') {
        None => (pattern == name).then_some(None),
        Some((start, end)) => {
            let number = name.strip_prefix(start)?.strip_suffix(end)?;
            // A hostile name must not overflow the arithmetic on indices.
            let number = number.parse::<u16>().ok().filter(|_| number.bytes().all(|byte| byte.is_ascii_digit()))?;
            Some(Some(number.into()))
        }
    }
}

fn numbered(pattern: &str, number: Option<usize>) -> String {
    number.map_or_else(|| pattern.to_owned(), |number| pattern.replace('#', &number.to_string()))
}

impl Table {
    fn depths(&self, names: &[&str]) -> Depths {
        let block = |name: &&str| split_number(name.strip_prefix(self.blocks)?).map(|(block, _)| block + 1);
        Depths { layers: names.iter().filter_map(block).max().unwrap_or(0), ..Depths::default() }
    }

    /// Whether a name is canonical.
    fn is_canonical(&self, name: &str) -> bool {
        let (module, _) = name.rsplit_once('.').unwrap_or((name, ""));
        self.tensors.iter().any(|(_, canonical)| *canonical == name)
            || self.modules.iter().flat_map(|own| own.canonical).any(|(pattern, _)| matched(pattern, module).is_some())
    }
}

impl Tree for Table {
    fn depths_of_stored(&self, names: &[&str]) -> Depths {
        let weights = names.iter().filter_map(|name| self.weights(name, &Depths::default())).flatten();
        let canonical: Vec<String> = weights.map(|(name, _)| name).collect();
        self.depths(&canonical.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn depths_of_canonical(&self, names: &[&str]) -> Depths {
        self.depths(names)
    }

    fn weights(&self, stored: &str, depths: &Depths) -> Option<Vec<(String, Piece)>> {
        let bare = PREFIXES.iter().find_map(|prefix| stored.strip_prefix(prefix)).unwrap_or(stored);
        // diffusers' own file has a module with a prefix's name.
        for name in [bare, stored] {
            if let Some((_, canonical)) = self.tensors.iter().find(|(original, _)| *original == name) {
                return Some(vec![((*canonical).to_owned(), Piece::All)]);
            }
            let (module, kind) = name.rsplit_once('.').unwrap_or((name, ""));
            let own = self.modules.iter().find_map(|own| Some((own, matched(own.original, module)?)));
            if let Some((own, number)) = own.filter(|(own, _)| ["weight", "bias", own.weight].contains(&kind)) {
                let kind = if kind == own.weight { "weight" } else { kind };
                let weight = |(index, (pattern, _)): (usize, &(&str, usize))| {
                    (format!("{}.{kind}", numbered(pattern, number)), own.piece(index, number, depths))
                };
                return Some(own.canonical.iter().enumerate().map(weight).collect());
            }
            if self.is_canonical(name) {
                return Some(vec![(name.to_owned(), Piece::All)]);
            }
        }
        None
    }

    fn stored(&self, canonical: &str, depths: &Depths) -> Option<(String, Piece)> {
        if let Some((original, _)) = self.tensors.iter().find(|(_, own)| *own == canonical) {
            return Some(((*original).to_owned(), Piece::All));
        }
        let (module, kind) = canonical.rsplit_once('.')?;
        self.modules.iter().find_map(|own| {
            let place = |(index, (pattern, _)): (usize, &(&str, usize))| Some((index, matched(pattern, module)?));
            let (index, number) = own.canonical.iter().enumerate().find_map(place)?;
            let kind = if kind == "weight" { own.weight } else { kind };
            Some((format!("{}.{kind}", numbered(own.original, number)), own.piece(index, number, depths)))
        })
    }
}
