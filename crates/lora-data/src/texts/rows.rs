//! Documents become rows: what is longer than a row is treated as the run asks, and with packing several documents share a
//! row, each into the first one that has room for it.

use std::ops::Range;

use super::LongDocuments;

/// The bit of a token that says that it is learned.
pub(super) const TRAINED: u32 = 1 << 31;

/// A run of tokens that attends to nothing but itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Document {
    /// Its first token among all.
    pub(super) start: usize,
    /// Number of its tokens.
    pub(super) length: u32,
    /// Of these, how many at its beginning are only read: at least 1, as the first token follows nothing.
    pub(super) context: u32,
    /// How many are learned.
    pub(super) trained: u32,
    /// The record that it is from.
    pub(super) record: u32,
}

impl Document {
    pub(super) fn new(tokens: &[u32], range: Range<usize>, context: usize, record: u32) -> Self {
        let own = &tokens[range.clone()];
        let trained = own.iter().skip(context).filter(|token| **token & TRAINED != 0).count();
        Self { start: range.start, length: own.len() as u32, context: context as u32, trained: trained as u32, record }
    }

    pub(super) fn range(&self) -> Range<usize> {
        self.start..self.start + self.length as usize
    }
}

/// What became of the documents that were longer than a row.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Long {
    /// Records of which the end was cut off, with the number of tokens that were.
    pub(super) cut: Vec<(u32, usize)>,
    /// Records that were split, with the number of pieces.
    pub(super) split: Vec<(u32, usize)>,
    /// Records that were left out, with their length.
    pub(super) skipped: Vec<(u32, usize)>,
    /// Records of which nothing that is learned is left.
    pub(super) emptied: Vec<u32>,
}

/// The documents of one record in rows of at most `most` tokens. `whole` are its documents: one, or two that stay together.
/// What is left of them is one group after the other; a group shares a row.
pub(super) fn fit(
    tokens: &[u32],
    whole: &[Range<usize>],
    record: u32,
    (most, policy, overlap): (usize, LongDocuments, usize),
    long: &mut Long,
) -> Vec<Vec<Document>> {
    let document = |range: Range<usize>, context: usize| Document::new(tokens, range, context, record);
    let length: usize = whole.iter().map(ExactSizeIterator::len).sum();
    let groups: Vec<Vec<Document>> = match (policy, whole) {
        _ if length <= most => vec![whole.iter().map(|range| document(range.clone(), 1)).collect()],
        (LongDocuments::Truncate, _) => {
            // Of a pair each has its half, and what the other leaves.
            let half = most / whole.len().max(1);
            let least = whole.iter().map(|range| range.len().min(half)).min().unwrap_or(half);
            let room = if whole.len() > 1 { most - least } else { most };
            vec![whole.iter().map(|range| document(range.start..range.end.min(range.start + room), 1)).collect()]
        }
        // One token at least is repeated, so that each is learned once though the first of a piece is not.
        (LongDocuments::Split, [whole]) => {
            pieces(whole, most, overlap.max(1)).map(|(range, context)| vec![document(range, context)]).collect()
        }
        _ => {
            long.skipped.push((record, length));
            return Vec::new();
        }
    };
    let count = groups.len();
    // A piece of a conversation in which nobody answers teaches nothing.
    let learns = |group: &Vec<Document>| group.iter().all(|document| document.trained > 0);
    let groups: Vec<Vec<Document>> = groups.into_iter().filter(learns).collect();
    match policy {
        _ if groups.is_empty() => long.emptied.push(record),
        _ if length <= most => {}
        LongDocuments::Truncate => long.cut.push((record, length - most)),
        _ => long.split.push((record, count)),
    }
    groups
}

/// A document in pieces of at most `most` tokens, each with how many of its tokens the piece before has had.
fn pieces(whole: &Range<usize>, most: usize, overlap: usize) -> impl Iterator<Item = (Range<usize>, usize)> {
    let (first, last) = (whole.start, whole.end);
    let starts = std::iter::successors(Some(first), move |start| {
        (start + most < last).then(|| start + most - overlap.min(most - 1))
    });
    starts.map(move |start| (start..last.min(start + most), if start == first { 1 } else { overlap }))
}

/// Which documents share a row: groups one by one, or each in the first row that has room.
#[derive(Debug, Clone, Default)]
pub(super) struct Rows {
    /// Documents, row after row.
    order: Vec<u32>,
    /// Where each row begins in the order, and the end.
    starts: Vec<u32>,
}

impl Rows {
    /// Rows of whole groups, which follow one another in the documents and have so many members each.
    pub(super) fn of(documents: &[Document], groups: &[u32], most: usize, packing: bool) -> Self {
        let mut rows: Vec<Vec<u32>> = Vec::new();
        let mut room = Room::default();
        let mut next = 0u32;
        for &members in groups {
            let own = next..next + members;
            next = own.end;
            let length: usize = own.clone().map(|index| documents[index as usize].length as usize).sum();
            let place = if packing { room.first(length) } else { None };
            match place {
                Some(row) => {
                    room.take(row, length);
                    rows[row].extend(own);
                }
                None => {
                    rows.push(own.collect());
                    if packing {
                        room.push(most - length.min(most));
                    }
                }
            }
        }
        Self::from_lists(rows)
    }

    fn from_lists(rows: Vec<Vec<u32>>) -> Self {
        let mut own = Self { order: Vec::new(), starts: vec![0] };
        for row in rows {
            own.order.extend(row);
            own.starts.push(own.order.len() as u32);
        }
        own
    }

    pub(super) fn count(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    pub(super) fn documents(&self, row: usize) -> &[u32] {
        &self.order[self.starts[row] as usize..self.starts[row + 1] as usize]
    }

    /// Without some rows.
    pub(super) fn retain(&mut self, kept: &[bool]) {
        let rows = (0..self.count()).filter(|row| kept.get(*row).is_none_or(|kept| *kept));
        *self = Self::from_lists(rows.map(|row| self.documents(row).to_vec()).collect());
    }
}

/// The room that is left in each row, as a tree of maxima, so that the first row with enough is found in few steps.
#[derive(Debug, Default)]
struct Room {
    /// A power of two of leaves; node `n` is the larger of `2n` and `2n + 1`.
    tree: Vec<usize>,
    rows: usize,
}

impl Room {
    fn leaves(&self) -> usize {
        self.tree.len() / 2
    }

    /// The first row with so much room.
    fn first(&self, length: usize) -> Option<usize> {
        if self.tree.get(1).is_none_or(|most| *most < length) {
            return None;
        }
        let mut node = 1;
        while node < self.leaves() {
            node *= 2;
            if self.tree[node] < length {
                node += 1;
            }
        }
        let row = node - self.leaves();
        (row < self.rows).then_some(row)
    }

    fn push(&mut self, room: usize) {
        if self.rows == self.leaves() {
            let leaves = (2 * self.rows).max(1);
            let mut tree = vec![0; 2 * leaves];
            tree[leaves..leaves + self.rows].copy_from_slice(&self.tree[self.leaves()..]);
            (1..leaves).rev().for_each(|node| tree[node] = tree[2 * node].max(tree[2 * node + 1]));
            self.tree = tree;
        }
        self.rows += 1;
        self.set(self.rows - 1, room);
    }

    fn take(&mut self, row: usize, length: usize) {
        let left = self.tree[self.leaves() + row];
        self.set(row, left.saturating_sub(length));
    }

    fn set(&mut self, row: usize, room: usize) {
        let mut node = self.leaves() + row;
        self.tree[node] = room;
        while node > 1 {
            node /= 2;
            self.tree[node] = self.tree[2 * node].max(self.tree[2 * node + 1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The tree finds what looking through all rows finds.
        #[test]
        fn documents_go_into_the_first_row_with_room(lengths in proptest::collection::vec(0usize..40, 0..120)) {
            let tokens = vec![TRAINED; 40];
            let documents: Vec<Document> =
                lengths.iter().map(|length| Document::new(&tokens, 0..*length, 1, 0)).collect();
            let rows = Rows::of(&documents, &vec![1; lengths.len()], 40, true);
            let mut expected: Vec<Vec<u32>> = Vec::new();
            for (index, length) in lengths.iter().enumerate() {
                let sum = |row: &Vec<u32>| row.iter().map(|own| lengths[*own as usize]).sum::<usize>();
                match expected.iter_mut().find(|row| sum(row) + length <= 40) {
                    Some(row) => row.push(index as u32),
                    None => expected.push(vec![index as u32]),
                }
            }
            let found: Vec<Vec<u32>> = (0..rows.count()).map(|row| rows.documents(row).to_vec()).collect();
            prop_assert_eq!(found, expected);
        }

        /// Every learned token but the very first is learned exactly once, whatever the overlap.
        #[test]
        fn pieces_of_a_long_document_learn_each_token_once(
            length in 2usize..200, most in 2usize..50, overlap in 0usize..49, learned in proptest::collection::vec(any::<bool>(), 200)
        ) {
            prop_assume!(overlap < most);
            let tokens: Vec<u32> =
                (0..length).map(|id| id as u32 | if learned[id] { TRAINED } else { 0 }).collect();
            let (mut long, mut times) = (Long::default(), vec![0; length]);
            let whole = 0..length;
            let groups = fit(&tokens, &[whole], 7, (most, LongDocuments::Split, overlap), &mut long);
            for document in groups.iter().flatten() {
                prop_assert!(document.length as usize <= most && document.trained > 0);
                let own = document.range().skip(document.context as usize);
                own.filter(|at| learned[*at]).for_each(|at| times[at] += 1);
            }
            let expected: Vec<i32> = (0..length).map(|at| i32::from(at > 0 && learned[at])).collect();
            prop_assert_eq!(times, expected);
            prop_assert_eq!(long.emptied.len(), usize::from(groups.is_empty()));
            prop_assert_eq!(long.split.len(), usize::from(length > most && !groups.is_empty()));
        }
    }

    #[test]
    fn what_is_too_long_is_cut_or_left_out_as_asked() {
        let tokens: Vec<u32> = (0..30).map(|id| id | TRAINED).collect();
        let of = |whole: &[Range<usize>], policy| {
            let mut long = Long::default();
            (fit(&tokens, whole, 3, (8, policy, 2), &mut long), long)
        };
        let long_one = 0..20;
        let one = std::slice::from_ref(&long_one);
        let (cut, long) = of(one, LongDocuments::Truncate);
        assert_eq!((cut[0][0].range(), cut[0][0].trained, long.cut), (0..8, 7, vec![(3, 12)]));
        let (none, long) = of(one, LongDocuments::Skip);
        assert_eq!((none.len(), long.skipped), (0, vec![(3, 20)]));
        let (split, _) = of(one, LongDocuments::Split);
        let pieces: Vec<_> = split.iter().map(|group| (group[0].range(), group[0].trained)).collect();
        assert_eq!(pieces, [(0..8, 7), (6..14, 6), (12..20, 6)]);
        // A pair is never torn apart.
        let pair: [Range<usize>; 2] = [0..10, 10..13];
        assert_eq!(of(&pair, LongDocuments::Split).1.skipped, [(3, 13)]);
        // Of this one only the end is learned, which is cut off.
        let asked: Vec<u32> = (0..30).map(|id| if id < 15 { id } else { id | TRAINED }).collect();
        let mut long = Long::default();
        assert!(fit(&asked, one, 3, (8, LongDocuments::Truncate, 2), &mut long).is_empty());
        assert_eq!(long, Long { emptied: vec![3], ..Long::default() });
        let (cut, _) = of(&pair, LongDocuments::Truncate);
        assert_eq!(cut[0].iter().map(Document::range).collect::<Vec<_>>(), [0..5, 10..13]);
    }
}
