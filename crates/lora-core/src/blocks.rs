//! The blocks in which llama.cpp's GGUF files hold quantised weights: which there are, and how large they are. What their
//! bytes mean is told where files are read (lora-io's `gguf::blocks`); computing with them is lora-torch's.

use std::fmt;

/// How the numbers of a block are stored. A row of a weight is whole blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(non_camel_case_types, reason = "the names that the format and its users know")]
pub enum BlockKind {
    /// 4.5 bits a number: a factor for 32.
    Q4_0,
    /// 5 bits a number: a factor and a minimum for 32.
    Q4_1,
    /// 5.5 bits a number: a factor for 32.
    Q5_0,
    /// 6 bits a number: a factor and a minimum for 32.
    Q5_1,
    /// 8.5 bits a number: a factor for 32.
    Q8_0,
    /// 4.5 bits a number: a factor and a minimum for 256, and shares of both for 32.
    Q4_K,
    /// 5.5 bits a number: a factor and a minimum for 256, and shares of both for 32.
    Q5_K,
    /// 6.56 bits a number: a factor for 256, and shares of it for 16.
    Q6_K,
}

impl BlockKind {
    /// All of them.
    pub const ALL: [BlockKind; 8] = {
        use BlockKind::*;
        [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K]
    };

    /// The kind of an element type's number in GGUF files; none for types that are not blocks, or not computed with.
    pub fn from_gguf(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.gguf() == id)
    }

    /// Its number in GGUF files.
    pub fn gguf(self) -> u32 {
        match self {
            BlockKind::Q4_0 => 2,
            BlockKind::Q4_1 => 3,
            BlockKind::Q5_0 => 6,
            BlockKind::Q5_1 => 7,
            BlockKind::Q8_0 => 8,
            BlockKind::Q4_K => 12,
            BlockKind::Q5_K => 13,
            BlockKind::Q6_K => 14,
        }
    }

    /// Numbers and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            BlockKind::Q4_0 => (32, 18),
            BlockKind::Q4_1 => (32, 20),
            BlockKind::Q5_0 => (32, 22),
            BlockKind::Q5_1 => (32, 24),
            BlockKind::Q8_0 => (32, 34),
            BlockKind::Q4_K => (256, 144),
            BlockKind::Q5_K => (256, 176),
            BlockKind::Q6_K => (256, 210),
        }
    }

    /// Bytes of a weight `[outputs, inputs]`; none where its rows are not whole blocks, or it is larger than memory can
    /// be.
    pub fn bytes(self, shape: [usize; 2]) -> Option<usize> {
        let ([outputs, inputs], (numbers, bytes)) = (shape, self.block());
        if !inputs.is_multiple_of(numbers) {
            return None;
        }
        (inputs / numbers).checked_mul(bytes)?.checked_mul(outputs).filter(|&all| isize::try_from(all).is_ok())
    }
}

/// As plans and messages call it: `q4_k`.
impl fmt::Display for BlockKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_known_by_its_number_and_weights_are_whole_blocks() {
        for kind in BlockKind::ALL {
            assert_eq!(BlockKind::from_gguf(kind.gguf()), Some(kind));
            let (numbers, bytes) = kind.block();
            assert_eq!(kind.bytes([3, 2 * numbers]), Some(6 * bytes));
            assert_eq!(kind.bytes([3, 2 * numbers - 1]), None);
            assert_eq!(kind.bytes([usize::MAX / 2, numbers]), None);
        }
        // F16 is numbers of its own, IQ4_XS has tables that are not here.
        assert_eq!([1, 23].map(BlockKind::from_gguf), [None, None]);
        assert_eq!(BlockKind::Q4_K.to_string(), "q4_k");
    }
}
