//! Regularisation pictures: as many visits as the pictures to learn have, by sd-scripts' rule.

use super::{Item, Role};

/// Gives regularisation pictures as many visits per epoch as the others have together: in their order they are taken with
/// their own repeats until there are enough, and the rest left out; where there are too few, repeats rise by one in turn.
pub fn balance(items: &mut Vec<Item>) {
    let visits: usize = items.iter().filter(|item| item.role == Role::Training).map(|item| item.repeats).sum();
    let mut count = 0;
    items.retain(|item| {
        let keep = item.role == Role::Training || count < visits;
        count += if item.role == Role::Regularisation && keep { item.repeats } else { 0 };
        keep
    });
    let mut own: Vec<&mut Item> = items.iter_mut().filter(|item| item.role == Role::Regularisation).collect();
    let mut turn = (0..own.len()).cycle();
    while count < visits {
        let Some(next) = turn.next() else { return };
        own[next].repeats += 1;
        count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::{CaptionSource, Stored};

    fn visits(training: &[usize], regularisation: &[usize]) -> Vec<usize> {
        let item = |role, &repeats: &usize| Item {
            file: Stored::file("a.png"),
            folder: "x".into(),
            caption: String::new(),
            more_lines: Vec::new(),
            caption_source: CaptionSource::None,
            size: (8, 8),
            repeats,
            mask: None,
            role,
        };
        let mut items: Vec<Item> = training.iter().map(|repeats| item(Role::Training, repeats)).collect();
        items.extend(regularisation.iter().map(|repeats| item(Role::Regularisation, repeats)));
        balance(&mut items);
        items.iter().filter(|item| item.role == Role::Regularisation).map(|item| item.repeats).collect()
    }

    #[test]
    fn as_many_visits_as_there_is_to_learn() {
        assert_eq!(visits(&[10, 10], &[1; 30]), [1; 20], "the rest is left out");
        assert_eq!(visits(&[10], &[1, 1, 1]), [4, 3, 3], "they rise in turn");
        assert_eq!(visits(&[5], &[3, 3, 3]), [3, 3], "whole pictures, as sd-scripts counts");
        assert_eq!(visits(&[5], &[]), [] as [usize; 0]);
        assert_eq!(visits(&[], &[2, 2]), [] as [usize; 0], "nothing to learn, nothing to keep");
    }
}
