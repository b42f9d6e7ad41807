import type { Token } from './tokens'

/** What a text finds: a token's id as `#719`, else any token whose text contains it. */
export function matcher(query: string): ((token: Token) => boolean) | undefined {
  const id = query.match(/^#(\d+)$/)
  if (id) return (token) => token.id === Number(id[1])
  const text = query.trim().toLowerCase()
  if (text === '') return undefined
  const exactly = query.startsWith(' ') || query.startsWith('␣')
  if (exactly) {
    const label = `␣${text.replace(/^␣/, '')}`
    return (token) => token.label.toLowerCase() === label
  }
  return (token) => token.label.toLowerCase().includes(text)
}
