//! The two orders of the rows that rotary positions turn. In Hugging Face order row j of a head rotates with
//! row j + half; in GGUF order of architecture `llama` rows 2j and 2j + 1 rotate together (files of the other
//! architectures keep Hugging Face order). Weights of Q and K
//! and the B factors of their adapters are stored in one order and must be reordered for the other: left as
//! they are, the mean loss hardly moves but single tokens are wrong.

/// Reorders rows from Hugging Face to GGUF order; `rows` is a whole number of heads of even size.
pub(crate) fn to_gguf<T: Copy>(values: &[T], rows: usize, heads: usize) -> Vec<T> {
    let half = rows / heads / 2;
    reorder(values, rows, |head, row| head * 2 * half + row % 2 * half + row / 2, heads)
}

/// Reorders rows from GGUF to Hugging Face order.
pub(crate) fn to_hugging_face<T: Copy>(values: &[T], rows: usize, heads: usize) -> Vec<T> {
    let half = rows / heads / 2;
    reorder(values, rows, |head, row| head * 2 * half + row % half * 2 + row / half, heads)
}

/// Row `row` of head `head` of the result is the row of `values` that `source` names.
fn reorder<T: Copy>(
    values: &[T],
    rows: usize,
    source: impl Fn(usize, usize) -> usize,
    heads: usize,
) -> Vec<T> {
    assert!(rows.is_multiple_of(2 * heads), "{rows} rows are not {heads} heads of even size");
    let cols = values.len() / rows;
    let mut result = Vec::with_capacity(values.len());
    for head in 0..heads {
        for row in 0..rows / heads {
            result.extend_from_slice(&values[source(head, row) * cols..][..cols]);
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_interleaved_within_each_head() {
        let rows: Vec<u8> = (0..12).collect();
        assert_eq!(to_gguf(&rows, 12, 2), [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        assert_eq!(to_hugging_face(&rows, 12, 2), [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
    }

    #[test]
    fn rows_of_many_columns_come_back() {
        let values: Vec<u16> = (0..48).collect();
        assert_eq!(to_gguf(&values, 8, 2)[6..12], values[12..18]);
        assert_eq!(to_hugging_face(&to_gguf(&values, 8, 2), 8, 2), values);
    }
}
