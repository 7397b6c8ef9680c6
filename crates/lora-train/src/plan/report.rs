//! A plan as text for people.

use std::fmt;

use super::{MemoryPart, Peaks, Plan, Remedy};
use crate::bytes::show;

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory of {}", self.device)?;
        match self.budget {
            Some(budget) => writeln!(f, ", of which {} may be used", show(budget))?,
            None => writeln!(f)?,
        }
        writeln!(f, "\nAs configured: {} at the peak", show(self.as_configured.peak()))?;
        table(f, &self.as_configured)?;
        if !self.remedies.is_empty() {
            writeln!(f, "\nTo make it fit:")?;
            list(f, &self.remedies)?;
            writeln!(f, "\nWith these: {} at the peak", show(self.planned.peak()))?;
            table(f, &self.planned)?;
        } else if let Some(budget) = self.budget {
            writeln!(f, "\nIt fits, with {} left.", show(budget.saturating_sub(self.planned.peak())))?;
        } else if !self.alternatives.is_empty() {
            writeln!(f, "\nWhat would need less, each alone:")?;
            list(f, &self.alternatives)?;
        }
        if let Some(own) = &self.planned.recordings {
            writeln!(
                f,
                "\nCUDA graphs keep the {} of a step for themselves. Samples, validation and the first visit of each\n\
                 further shape of items come on top, to {} at most; where that does not fit, they make room.",
                show(own.bytes),
                show(own.most)
            )?;
        }
        if let Some(own) = &self.planned.exchanged {
            let bytes = show(own.bytes);
            writeln!(
                f,
                "\nEach of {} ranks needs this, and sends the others {bytes} of gradients for each step.",
                own.ranks
            )?;
        }
        if !self.spend.is_empty() {
            writeln!(f, "\nWhat is left could be spent on, each alone:")?;
            list(f, &self.spend)?;
        }
        Ok(())
    }
}

/// Phases as rows, parts as columns; parts that no phase has are left out.
fn table(f: &mut fmt::Formatter<'_>, prediction: &Peaks) -> fmt::Result {
    let mut parts: Vec<MemoryPart> =
        prediction.phases.iter().flat_map(|phase| phase.parts.parts()).map(|(part, _)| part).collect();
    parts.sort();
    parts.dedup();
    let mebibytes = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    let names = prediction.phases.iter().map(|phase| phase.name());
    let mut rows: Vec<Vec<String>> = vec![std::iter::once("MiB".to_owned()).chain(names).collect()];
    let mut row = |name: &str, bytes: &dyn Fn(&super::PhasePeak) -> u64| {
        let cells = prediction.phases.iter().map(|phase| mebibytes(bytes(phase)));
        rows.push(std::iter::once(name.to_owned()).chain(cells).collect());
    };
    for part in parts {
        row(&part.name(), &|phase| phase.parts.of(part));
    }
    row("beside tensors", &|phase| phase.overhead);
    row("peak", &|phase| phase.total());
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    for row in &rows {
        write!(f, "  {:<1$}", row[0], widths[0])?;
        for (cell, width) in row.iter().zip(&widths).skip(1) {
            write!(f, "  {cell:>width$}")?;
        }
        writeln!(f)?;
    }
    Ok(())
}

fn list(f: &mut fmt::Formatter<'_>, remedies: &[Remedy]) -> fmt::Result {
    for remedy in remedies {
        writeln!(f, "  {remedy}\n    {}", remedy.cost)?;
    }
    Ok(())
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, setting) in self.settings.iter().enumerate() {
            write!(f, "{}{} = {} (was {})", if index > 0 { ", " } else { "" }, setting.key, setting.to, setting.from)?;
        }
        let (sign, difference) = match self.peak_after <= self.peak_before {
            true => ("−", self.peak_before - self.peak_after),
            false => ("+", self.peak_after - self.peak_before),
        };
        write!(f, ": {sign}{}, to {}", show(difference), show(self.peak_after))
    }
}
