-- empty_batch
-- Empties the batch's tables; normally the commit does this.

truncate pg_temp.batch_conversations, pg_temp.batch_messages, pg_temp.batch_seqs, pg_temp.batch_moves
