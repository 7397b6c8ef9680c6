//! Bytes by what they are for, alive and at the peak. It allocates nothing itself: blocks are numbers that know their size and
//! give it back when the last holder lets go, as tensors do.

use std::cell::Cell;
use std::rc::Rc;

/// What memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Frozen weights of the U-Net, as they are stored.
    Unet,
    /// Frozen weights of the text encoder.
    TextEncoder,
    /// Weights of the autoencoder.
    Autoencoder,
    /// The adapter's tensors, in fp32.
    Adapter,
    /// Gradients of the adapter.
    Gradients,
    /// State of the optimiser.
    Optimiser,
    /// Activations that the backward pass needs.
    Saved,
    /// Everything that comes and goes: activations on their way, gradients of activations, workspaces, whole weights of layers
    /// stored in fewer bytes.
    Working,
}

impl Part {
    /// All of them, in the order of reports.
    pub const ALL: [Part; 8] = [
        Part::Unet,
        Part::TextEncoder,
        Part::Autoencoder,
        Part::Adapter,
        Part::Gradients,
        Part::Optimiser,
        Part::Saved,
        Part::Working,
    ];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Part::Unet => "U-Net weights",
            Part::TextEncoder => "text encoder weights",
            Part::Autoencoder => "autoencoder weights",
            Part::Adapter => "adapter weights",
            Part::Gradients => "adapter gradients",
            Part::Optimiser => "optimiser state",
            Part::Saved => "saved activations",
            Part::Working => "working memory",
        }
    }
}

/// Bytes by part at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage([u64; Part::ALL.len()]);

impl Usage {
    /// Parts that there is something of, with their bytes.
    pub fn parts(&self) -> impl Iterator<Item = (Part, u64)> {
        Part::ALL.into_iter().map(|part| (part, self.of(part))).filter(|&(_, bytes)| bytes > 0)
    }

    /// Bytes of a part.
    pub fn of(&self, part: Part) -> u64 {
        self.0[part as usize]
    }

    /// All bytes.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

impl serde::Serialize for Usage {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.parts())
    }
}

/// Counts blocks. Clones share the count.
#[derive(Debug, Clone)]
pub(super) struct Meter(Rc<Counts>);

#[derive(Debug)]
struct Counts {
    live: Cell<Usage>,
    peak: Cell<Usage>,
    /// Sizes are rounded up to multiples of this.
    unit: u64,
}

/// Memory of a size, alive while somebody holds it.
#[derive(Debug)]
pub(super) struct Block {
    bytes: u64,
    part: Cell<Part>,
    /// Nodes of graphs that hold on to it.
    savers: Cell<u32>,
    meter: Meter,
}

impl Meter {
    /// Nothing yet; sizes are rounded up to multiples of `unit`.
    pub(super) fn new(unit: u64) -> Self {
        let none = Usage::default();
        Self(Rc::new(Counts { live: Cell::new(none), peak: Cell::new(none), unit }))
    }

    /// A new block.
    pub(super) fn block(&self, bytes: u64, part: Part) -> Rc<Block> {
        let bytes = bytes.next_multiple_of(self.0.unit);
        self.change(part, bytes as i64);
        let now = self.0.live.get();
        if now.total() > self.0.peak.get().total() {
            self.0.peak.set(now);
        }
        Rc::new(Block { bytes, part: Cell::new(part), savers: Cell::new(0), meter: self.clone() })
    }

    /// What is alive.
    #[cfg(test)]
    pub(super) fn live(&self) -> Usage {
        self.0.live.get()
    }

    /// What was alive at the moment when most was, since the last reset.
    pub(super) fn peak(&self) -> Usage {
        self.0.peak.get()
    }

    /// Starts the peak anew.
    pub(super) fn reset_peak(&self) {
        self.0.peak.set(self.0.live.get());
    }

    fn change(&self, part: Part, bytes: i64) {
        let mut live = self.0.live.get();
        let own = &mut live.0[part as usize];
        *own = own.wrapping_add_signed(bytes);
        self.0.live.set(live);
    }
}

impl Block {
    /// Its size.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Counts as another part from now on.
    pub(super) fn count_as(&self, part: Part) {
        self.meter.change(self.part.get(), -(self.bytes as i64));
        self.meter.change(part, self.bytes as i64);
        self.part.set(part);
    }

    /// A graph holds on to it: working memory becomes a saved activation.
    pub(super) fn save(&self) {
        self.savers.set(self.savers.get() + 1);
        if self.part.get() == Part::Working {
            self.count_as(Part::Saved);
        }
    }

    /// A graph lets go of it.
    pub(super) fn unsave(&self) {
        self.savers.set(self.savers.get() - 1);
        if self.savers.get() == 0 && self.part.get() == Part::Saved {
            self.count_as(Part::Working);
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.meter.change(self.part.get(), -(self.bytes as i64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_count_while_they_are_held() {
        let meter = Meter::new(512);
        let a = meter.block(1, Part::Working);
        let b = meter.block(1000, Part::Unet);
        assert_eq!((meter.live().of(Part::Working), meter.live().of(Part::Unet)), (512, 1024));
        a.save();
        a.save();
        a.unsave();
        assert_eq!((meter.live().of(Part::Working), meter.live().of(Part::Saved)), (0, 512));
        drop(b);
        assert_eq!((meter.live().total(), meter.peak().total()), (512, 1536));
        meter.reset_peak();
        a.unsave();
        drop(a);
        assert_eq!((meter.live().total(), meter.peak().total()), (0, 512));
    }
}
